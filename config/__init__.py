"""Configuration: TOML files read into frozen dataclasses (``schema``, ``load``)."""
