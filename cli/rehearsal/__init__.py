"""Whether a command continues after a kill: it is performed, killed, and compared."""
