"""Who asks, and whether they may: hosts, origins, tokens, proxies; how often they ask, and how many
watch at once."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from ..config.integrations import is_loopback, split_listen
from ..config.schema import Gateway
from ..protocol.errors import NotFound
from .problems import HttpProblem
from .rate_limit import RateLimit
from .tokens import ANYBODY, Caller, Scope, Tokens

#: Of a request's head, also where it came at once.
MOST_HEAD = 32 * 1024


class Watching:
    """One that watches for ``caller``. ``sent_away``: it may not any more; ``wake`` tells it."""

    def __init__(self, caller: Caller, all_of_them: set[Watching]) -> None:
        self.caller = caller
        self.sent_away = False
        self.wake: Callable[[], None] = lambda: None
        self._all = all_of_them

    def left(self) -> None:
        self._all.discard(self)


class Access:
    """As ``gateway`` says. Raises ConfigError, of the file of tokens. Blocking."""

    def __init__(self, gateway: Gateway, listen: str) -> None:
        self._gateway = gateway
        self._loopback = is_loopback(split_listen(listen)[0])
        self._hosts = {name.strip("[]").lower() for name in gateway.hosts}
        self._proxies = [ipaddress.ip_network(text) for text in gateway.trusted_proxies]
        self._tokens = None if gateway.tokens_file is None else Tokens(gateway.tokens_file)
        self._watching: set[Watching] = set()
        # Apart, so that no crowd of addresses makes one forget who has a name.
        self._named, self._unnamed = (
            RateLimit(gateway.max_rate, gateway.max_burst) for _ in range(2)
        )

    def check_head(self, request: HTTPConnection) -> None:
        """Raises HttpProblem: it is not meant for us, or comes from another site's page."""
        headers = request.headers
        if sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEAD:
            raise HttpProblem(431, "limit", f"the headers have more than {MOST_HEAD} bytes")
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise HttpProblem(400, "bad-request", "give one Host header")
        name = _host_name(hosts[0])
        # A page in somebody's browser may have a name of its own for this address.
        if self._is_guarded and not (is_loopback(name) or name in self._hosts):
            raise HttpProblem(
                421,
                "misdirected",
                "this name is not one of ours: ask for 127.0.0.1, [::1] or localhost, or add it to"
                " gateway.hosts",
            )
        origin = headers.get("origin")
        if (
            origin is not None
            and origin not in self._gateway.origins
            and origin.partition("://")[2].lower() != hosts[0].lower()
        ):
            raise HttpProblem(
                403,
                "other-origin",
                "pages of this site may not ask here; gateway.origins says whose",
            )

    @property
    def _is_guarded(self) -> bool:
        return self._loopback or bool(self._hosts)

    def admit(self, request: HTTPConnection) -> Caller:
        """Who asks; it counts as a request of theirs, or of where they are if nobody knows them.
        Raises HttpProblem."""
        try:
            caller = self.find_caller(request)
        except HttpProblem:
            self._count(request)
            raise
        self._count(request, caller)
        return caller

    def admit_anybody(self, request: HTTPConnection) -> None:
        """To what is no secret. Raises HttpProblem."""
        self._count(request, self._find_user(request) or ANYBODY)

    def _count(self, request: HTTPConnection, caller: Caller = ANYBODY) -> None:
        """Raises HttpProblem, where ``caller``, or ANYBODY's address, asks too often."""
        if caller is ANYBODY:
            wait = self._unnamed.take(_find_network(request))
        else:
            wait = self._named.take((caller.proxied, caller.name))
        if wait:
            raise HttpProblem(
                429,
                "too-many-requests",
                f"these are more than {self._gateway.max_rate} requests a second: wait, watch"
                " instead of asking, or submit many runs with one POST /v1/runs",
                {"retry-after": str(math.ceil(wait))},
            )

    def find_caller(self, request: HTTPConnection) -> Caller:
        """Raises HttpProblem."""
        if (user := self._find_user(request)) is not None:
            return user
        if self._tokens is None:
            if not self._proxies:
                return ANYBODY
            raise HttpProblem(
                403, "denied", "only requests by way of gateway.trusted_proxies are answered"
            )
        shown = _bearer(request.headers)
        caller = None if shown is None else self._tokens.find(shown)
        if caller is None:
            said = "show a token" if shown is None else "this token is not known"
            raise HttpProblem(
                401,
                "unauthorized",
                f"{said}: Authorization: Bearer TOKEN",
                {"www-authenticate": 'Bearer realm="runctl"'},
            )
        return caller

    def _find_user(self, request: HTTPConnection) -> Caller | None:
        """The one that a trusted proxy names."""
        name = self._gateway.user_header
        if name is None or request.client is None:
            return None
        try:
            peer = ipaddress.ip_address(request.client.host)
        except ValueError:
            return None
        mapped = getattr(peer, "ipv4_mapped", None)
        if not any((mapped or peer) in network for network in self._proxies):
            return None
        named = request.headers.getlist(name)
        if len(named) != 1 or not named[0].strip():
            return None
        return Caller(named[0].strip(), proxied=True)

    def watch(self, caller: Caller) -> Watching:
        """Count one more that watches, until it has ``left``. Raises HttpProblem."""
        most = self._gateway.max_watchers
        if sum(one.caller.name == caller.name for one in self._watching) >= most:
            raise HttpProblem(
                429, "too-many-watchers", f"{most} event streams are open already; close one"
            )
        watching = Watching(caller, self._watching)
        self._watching.add(watching)
        return watching

    async def follow_tokens(self) -> None:
        """For ever: send those away whose tokens are not there any more."""
        if self._tokens is not None:
            await self._tokens.follow(self._send_away)

    def _send_away(self) -> None:
        assert self._tokens is not None
        for watching in self._watching:
            caller = watching.caller
            if not caller.proxied and not self._tokens.holds(caller):
                watching.sent_away = True
                watching.wake()


def require(caller: Caller, scope: Scope, thread: str | None = None) -> None:
    """Raises HttpProblem; NotFound of a thread that ``caller`` may not know of."""
    if scope not in caller.scopes:
        raise HttpProblem(403, "denied", f"this token may not {scope}; use one with that scope")
    if thread is not None and not caller.may_see(thread):
        raise NotFound(f"no thread {thread!r}; see: runctl list")


def _find_network(request: HTTPConnection) -> str:
    """Where it comes from. In IPv6 a network, of which whoever has one has all addresses."""
    host = "" if request.client is None else request.client.host
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _bearer(headers: Headers) -> bytes | None:
    shown = headers.getlist("authorization")
    if len(shown) != 1:
        return None
    scheme, _, token = shown[0].partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else None
