"""The durable queue: DBOS, which nothing else imports."""
