"""``runctl``: the operators' command line. Imports client, protocol, config; never the daemon."""
