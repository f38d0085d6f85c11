"""Deployed entry point: what runs left behind in a bucket is found out, and what was paid for is stored."""

from prefect_eachlabs.flows.settle import settle_leftovers

if __name__ == "__main__":
    settle_leftovers.serve(name="settle")
