"""Thousands of pictures from a table: sources, the runner, reports. `runner` has the doors; none knows Prefect."""
