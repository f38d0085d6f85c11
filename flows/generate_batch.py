"""Deployed entry point: a table of prompts becomes PNGs in S3 and a report."""

from prefect_eachlabs.batch_flow import generate_batch

if __name__ == "__main__":
    generate_batch.serve(name="generate-batch")
