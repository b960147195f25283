"""Durable Streams, an open protocol over HTTP: https://github.com/durable-streams/durable-streams."""
