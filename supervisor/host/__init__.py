"""The machine we are on: files, logs, metrics, limits of the process."""
