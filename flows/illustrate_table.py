"""Deployed entry point: rows of a database table without a picture get one, and its address is written back."""

from prefect_eachlabs.flows.illustrate_table import illustrate_table

if __name__ == "__main__":
    illustrate_table.serve(name="illustrate-table")
