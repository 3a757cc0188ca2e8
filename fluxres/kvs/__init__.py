"""The key-value store of an instance, on rank 0 (RFC 11, RFC 16): store, commits, watches, service."""
