"""Trees of processes, and the keeper that ends them."""
