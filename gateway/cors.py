"""What browsers are told of pages of other sites that may ask: CORS."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

#: How long a browser may remember that it may ask, seconds.
REMEMBERED = 600


def allow_origins(application: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``application``, for pages of ``origins`` as well. A token is a header of theirs: a browser
    has nothing that it would send by itself."""
    if not origins:
        return application
    return CORSMiddleware(
        application,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],
        expose_headers=["*"],
        max_age=REMEMBERED,
    )
