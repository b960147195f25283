"""Following runs until they end."""
