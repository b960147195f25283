"""Unit files and what belongs to them, for ``importlib.resources.files``."""
