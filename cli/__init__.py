"""``runctl``: the operators' command line. Imports only wire, model, errors and config."""
