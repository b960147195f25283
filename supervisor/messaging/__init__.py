"""The connection to NATS, and the nats-server that we run."""
