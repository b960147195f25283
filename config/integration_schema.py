"""What [metrics], [traces], [hooks] and [gateway] may have, each key once; of the schema
(``schema``)."""

from pathlib import Path
from typing import Annotated

import msgspec

from .keys import Environment, FilePath, Flag, Own, Seconds, Section, Url, Whole

#: How a run may end, in the words of its status.
ENDED = ("succeeded", "failed", "aborted", "dead")


class Metrics(Section, frozen=True):
    """``listen``: HOST:PORT at which Prometheus reads; None for nowhere. A host other than
    loopback needs ``allow_remote``. ``token_file`` holds the bearer token that a request has to
    show, read at each so that it may be rotated; None: none is asked for."""

    listen: Annotated[
        str | None,
        Own("Where Prometheus reads, at `/metrics`.", form="`HOST:PORT`", default="nowhere"),
    ] = None
    allow_remote: Annotated[
        bool, Flag("Whether `listen` may be a host other than loopback; there is no TLS.")
    ] = False
    token_file: Annotated[
        Path | None,
        FilePath("A file with the bearer token that each request has to show.", holds="secret"),
    ] = None


class Traces(Section, frozen=True):
    """``endpoint``: an OTLP/HTTP collector's URL for traces; None for no traces."""

    endpoint: Annotated[
        str | None,
        Url(
            "An OTLP/HTTP collector for spans of runs.",
            schemes=("http", "https"),
            default="no traces",
        ),
    ] = None
    insecure: Annotated[bool, Flag("Whether `endpoint` may be `http://` on another host.")] = False


class Hooks(Section, frozen=True):
    """What is told of each run that ends as one of ``on``. ``on_end``: a command's argv, a
    URL that JSON is posted to, or None. ``headers`` for a URL, ``env`` for a command.

    One try takes ``timeout`` seconds at most. Before the second there are ``backoff``
    seconds, and twice as many before each further; after ``tries`` it is given up."""

    on_end: Annotated[
        tuple[str, ...] | str | None,
        Own(
            "What is told of each run that ends: a command, or a URL that JSON is posted to.",
            form='a list `["NAME", …]`, or an `http://` or `https://` URL',
            secret=True,
            default="nothing",
        ),
    ] = None
    on: Annotated[
        tuple[str, ...],
        Own(
            "Of runs that end like this.", form="a list of " + ", ".join(f'`"{x}"`' for x in ENDED)
        ),
    ] = ENDED
    headers: Annotated[
        dict[str, str], Own("Sent along with a URL.", form="a table of strings", secret=True)
    ] = msgspec.field(default_factory=dict)
    env: Annotated[
        dict[str, str],
        Environment(
            "Added to a command's environment.",
            each="hook",
            taken=(
                *("RUNCTL_THREAD", "RUNCTL_RUN", "RUNCTL_ATTEMPT"),
                *("RUNCTL_STATUS", "RUNCTL_HOOK"),
            ),
        ),
    ] = msgspec.field(default_factory=dict)
    timeout: Annotated[float, Seconds("How long one try may take.", least=0.001)] = 10.0
    tries: Annotated[int, Whole("After so many tries it is given up.", least=1, most=1000)] = 10
    backoff: Annotated[
        float,
        Seconds("Before the second try, and twice as long before each further one.", least=0.001),
    ] = 1.0
    insecure: Annotated[bool, Flag("Whether the URL may be `http://` on another host.")] = False


class Gateway(Section, frozen=True):
    """The HTTP gateway. ``listen``: HOST:PORT; None: the daemon starts none. ``tokens_file``: who
    may ask for what (``gateway.tokens``); None: whoever reaches a loopback address. ``hosts``:
    names by which browsers may call it, besides those of loopback. ``origins``: SCHEME://HOST of
    sites whose pages may ask. ``trusted_proxies``: addresses and networks whose ``user_header``
    says who asks, and who may do everything."""

    listen: Annotated[
        str | None,
        Own(
            "Where the HTTP gateway listens, which the daemon starts beside itself.",
            form="`HOST:PORT`",
            default="no gateway is started",
        ),
    ] = None
    tokens_file: Annotated[
        Path | None,
        FilePath(
            "A file of tokens, hashed, and what each may do; needed off loopback.",
            holds="trust",
            default="whoever reaches `listen` may do everything",
        ),
    ] = None
    hosts: Annotated[
        tuple[str, ...],
        Own("Names that a request may give as its host, besides loopback.", form="a list of names"),
    ] = ()
    origins: Annotated[
        tuple[str, ...],
        Own(
            "Sites whose pages may ask, in browsers (CORS), besides the gateway's own.",
            form='a list of origins, such as `"https://app.example.com"`',
        ),
    ] = ()
    trusted_proxies: Annotated[
        tuple[str, ...],
        Own(
            "Proxies that say in `user_header` who asks, in place of tokens.",
            form='a list of addresses, or networks such as `"10.1.0.0/24"`',
        ),
    ] = ()
    user_header: Annotated[
        str | None,
        Own(
            "The header in which `trusted_proxies` name the user, who may then do everything.",
            form="a header's name",
            default="none",
        ),
    ] = None
    max_rate: Annotated[
        int,
        Whole(
            "Requests a second of each token, user, or address of those without; on average.",
            least=1,
        ),
    ] = 200
    max_burst: Annotated[
        int, Whole("Requests that may come at once, before `max_rate` counts.", least=1)
    ] = 4000
    max_connections: Annotated[int, Whole("Connections at once.", least=1, most=1_000_000)] = 4096
    max_watchers: Annotated[
        int,
        Whole(
            "Event streams at once of each token, user, or of all where there are neither.", least=1
        ),
    ] = 2000
