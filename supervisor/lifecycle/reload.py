"""SIGHUP: the configuration is read again, and what can change without a restart does.

A file that is wrong changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import trio

from ...config.access import check_access
from ...config.accounts import check_rights
from ...config.keys import entries
from ...config.load import load
from ...config.schema import Config, ConfigError, Runner
from ...config.secrets import Masker
from ...config.transport import check_transport
from ..execution.settings import Settings
from .optional_packages import require_of_runners

log = logging.getLogger("runctld.reload")


#: Keys that show in the runners, which are compared one by one.
_IN_RUNNERS = ("runners", "allow_shell")


class Reload:
    """``run`` in a nursery. ``started``: the configuration that the daemon began with, from
    ``file`` or a default place. ``apply`` is called with one that is right, once ``hide``
    knows its secrets; each reload happens inside ``around()``."""

    def __init__(
        self,
        started: Config,
        file: Path | None,
        settings: Settings,
        apply: Callable[[Config], None],
        hide: Masker,
        around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        self._started = started
        self._now = started
        self._file = file
        self._settings = settings
        self._apply = apply
        self._hide = hide
        self._around = around

    async def run(self, wait_wish: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wait_wish()
            async with self._around():
                await self._reload()

    async def _reload(self) -> None:
        try:
            config = await trio.to_thread.run_sync(_load, self._file)
            self._hide.add(config)
            self._settings.replace(config)
            self._apply(config)
        except ConfigError as error:
            log.error("SIGHUP: nothing is changed: %s", error)
        except Exception as error:
            log.exception("SIGHUP: %s", error)
        else:
            log.info("SIGHUP: %s", self._told(config))
            self._now = config

    def _told(self, config: Config) -> str:
        """What this has changed, and what differs from the start and waits for the next."""
        done = _changed_runners(self._now.runners, config.runners)
        done += [key for key, live in differences(self._now, config) if live]
        waits = [key for key, live in differences(self._started, config) if not live]
        words = f"{config.source or 'defaults'}: changed: {', '.join(done) or 'nothing'}"
        return words + (f"; a restart is needed for: {', '.join(waits)}" if waits else "")


def _load(file: Path | None) -> Config:
    """Raises ConfigError, also when this process may not do, or has not, what it says."""
    config = load(file)
    check_access(config)
    check_transport(config)
    check_rights(config)
    require_of_runners(config)
    return config


def differences(a: Config, b: Config) -> list[tuple[str, bool]]:
    """The keys, runners' left out, in which two configurations differ, and whether a running
    daemon takes each over. Never the values, which may be secret."""
    found = {}
    for entry in entries(Config):
        one, other = getattr(a, entry.name), getattr(b, entry.name)
        if entry.part is not None:
            for inner in entries(entry.part):
                if getattr(one, inner.name) != getattr(other, inner.name):
                    # What is no key comes from a file that one names: a NATS context's login.
                    name = inner.name if inner.key is not None else "context"
                    found[f"{entry.name}.{name}"] = inner.key is not None and inner.key.live
        elif entry.key is not None and entry.name not in _IN_RUNNERS and one != other:
            found[entry.name] = entry.key.live
    return list(found.items())


def _changed_runners(before: Mapping[str, Runner], after: Mapping[str, Runner]) -> list[str]:
    found = []
    for name in sorted({*before, *after}):
        if name not in before:
            found.append(f"runner {name} (new)")
        elif name not in after:
            found.append(f"runner {name} (removed)")
        elif before[name] != after[name]:
            found.append(f"runner {name}")
    return found
