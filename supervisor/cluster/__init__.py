"""Leases, and the executors that hold them."""
