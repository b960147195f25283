"""What doctor and probes look at."""
