"""What daemon and clients share."""

__version__ = "0.1.0"
