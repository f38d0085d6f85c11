"""Deployed entry point: one reference picture, several prompts or samples."""

from prefect_eachlabs.vary_flow import vary_image

if __name__ == "__main__":
    vary_image.serve(name="vary-image")
