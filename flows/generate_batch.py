"""Deployed entry points: a table of prompts becomes PNGs in S3 and a report; and a share of one, for shards=N."""

from prefect_eachlabs.flows.batch import generate_batch, generate_shard

__all__ = ["generate_batch", "generate_shard"]

if __name__ == "__main__":
    generate_batch.serve(name="generate-batch")
