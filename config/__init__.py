"""Configuration: TOML files read into frozen structs (``schema``, ``load``)."""
