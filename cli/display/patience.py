"""Patience with a daemon that restarts, shown on the status line."""

from __future__ import annotations

from ...client.api import Client
from ...client.patience import WAIT, Patience
from ..common import App
from .status_line import StatusLine


def make_patience(app: App, line: StatusLine | None = None) -> Patience:
    """As much as ``--wait`` says. ``line``: where it is shown, when there is one already."""
    shown = line or StatusLine()

    def notice(waits: bool) -> None:
        shown.set("daemon", "runctl: waiting for runctld to come back" if waits else None)

    return Patience(app.config, WAIT if app.wait is None else app.wait, notice)


def make_client(app: App, line: StatusLine | None = None) -> Client:
    """What a verb asks with, not connected yet."""
    return Client(app.config, make_patience(app, line))
