"""The HTTP gateway: what runctl does, for browsers and for whatever speaks HTTP (docs/http.md).

A process of its own without state, which works on NATS directly; so it answers, and its watchers
go on, while daemons restart. asyncio throughout: nats-py is, and the server is.
"""
