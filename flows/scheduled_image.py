"""Deployed entry point: a prompt with the run's date becomes one PNG in S3."""

from prefect_eachlabs.flows.schedule import scheduled_image

if __name__ == "__main__":
    scheduled_image.serve(name="scheduled-image")
