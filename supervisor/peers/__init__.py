"""The other executors: requests to them, and taking over from them."""
