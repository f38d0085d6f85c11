"""The limits of an account: requests a minute and predictions in flight, never exceeded by all its processes together.

`limiter` is the queue of those who wait for slots, and leases them over the few calls of `leases`: from a Prefect
server (`prefect_leases`), or without one from a file of this machine (`file_leases`).
"""
