"""Deployed entry point: one prompt becomes one PNG in S3."""

from prefect_eachlabs.flows import generate_image

if __name__ == "__main__":
    generate_image.serve(name="generate-image")
