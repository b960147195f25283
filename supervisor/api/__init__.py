"""What the daemon answers: requests, and the metrics."""
