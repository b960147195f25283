"""``runctl gateway``: what runctl does, over HTTP."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import click

from ...config.load import find_file
from ...protocol.errors import Unavailable
from ..common import App, pass_app

#: What it needs besides, and nothing else here does.
NEEDED = ("httptools", "starlette", "uvicorn")


@click.command(
    short_help="Serve HTTP: threads, runs, live output.",
    epilog="""\b
Examples:
  runctl gateway
  runctl gateway --listen 127.0.0.1:8421""",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Where to listen.  [default: gateway.listen, else 127.0.0.1:8420]",
)
@pass_app
def gateway(app: App, listen: str | None) -> None:
    """Serve threads, runs and their live output over HTTP, until SIGTERM or Ctrl-C. It keeps no
    state, and goes on while daemons restart. Who may ask for what, off loopback in any case, is
    in gateway.tokens_file. docs/http.md has the rest, and the gateway /v1/openapi.json.
    """
    if not all(map(find_spec, NEEDED)):
        raise Unavailable(
            "the gateway needs packages that are not installed: pip install 'runctl[gateway]'"
        )
    file = app.config_file or find_file()
    # In this process's place, and without the current directory in the path of modules.
    argv = [sys.executable, "-P", "-m", "runctl.gateway.main"]
    argv += ["--config", str(file)] if file is not None else []
    argv += ["--listen", listen] if listen is not None else []
    os.execv(sys.executable, argv)
