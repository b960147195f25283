"""One attempt's life, and the order of runs within a thread."""
