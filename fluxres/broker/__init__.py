"""The broker: configuration, the incarnation loop, and the wiring of services into scopes."""
