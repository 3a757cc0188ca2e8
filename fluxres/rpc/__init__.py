"""Requests and their answers (RFC 6): client and server state, routing, tracking."""
