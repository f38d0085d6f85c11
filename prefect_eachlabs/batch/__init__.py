"""Thousands of pictures from a table: sources, runs, reports; `plan` opens a batch. None knows Prefect."""
