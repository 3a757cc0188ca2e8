"""Whole instances in one process: real brokers on an in-memory network, store and process table, on a virtual clock."""
