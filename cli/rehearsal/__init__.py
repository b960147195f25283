"""A private daemon, killed as a machine that loses power, and what is left of its runs."""
