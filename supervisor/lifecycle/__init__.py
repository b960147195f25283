"""The daemon's life: start, assembly, reload, stop."""
