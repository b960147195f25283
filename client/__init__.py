"""How any Python program reaches a daemon."""
