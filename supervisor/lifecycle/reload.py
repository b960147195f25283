"""SIGHUP: the configuration is read again, and what can change without a restart does.

A file that is wrong changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import trio

from ...config.access import check_access
from ...config.accounts import check_rights
from ...config.load import load
from ...config.schema import Config, ConfigError, Runner
from ...config.secrets import Masker
from ...config.transport import check_transport
from ..execution.settings import Settings

log = logging.getLogger("runctld.reload")

#: What a running daemon takes over. allow_shell shows in the runners.
_LIVE = ("runners", "allow_shell", "queue", "source", "withheld")
_SECTIONS = (
    *("database", "nats", "stream", "queue", "history", "takeover", "log"),
    *("metrics", "traces", "hooks"),
)


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
        done = [*_runners(self._now.runners, config.runners)]
        done += [k for k in differences(self._now, config) if _is_live(k)]
        waits = [k for k in differences(self._started, config) if not _is_live(k)]
        words = f"{config.source or 'defaults'}: changed: {', '.join(done) or 'nothing'}"
        return words + (f"; a restart is needed for: {', '.join(waits)}" if waits else "")


def _load(file: Path | None) -> Config:
    """Raises ConfigError, also when this process may not do what it says."""
    config = load(file)
    check_access(config)
    check_transport(config)
    check_rights(config)
    return config


def _is_live(key: str) -> bool:
    # Other executors were told of the grace at the start.
    return key.startswith("queue.") and key != "queue.lease_grace"


def differences(a: Config, b: Config) -> list[str]:
    """The keys, runners' left out, in which two configurations differ. Never the values,
    which may be secret."""
    found = []
    for field in fields(Config):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name in _SECTIONS:
            found += [f"{field.name}.{key}" for key in _changed(one, other)]
        elif field.name not in _LIVE and one != other:
            found.append(field.name)
    # Login is not a key: it is what the context file holds.
    return list(dict.fromkeys("nats.context" if x == "nats.login" else x for x in found))


def _changed(one: Any, other: Any) -> list[str]:
    return [f.name for f in fields(one) if getattr(one, f.name) != getattr(other, f.name)]


def _runners(before: Mapping[str, Runner], after: Mapping[str, Runner]) -> list[str]:
    found = []
    for name in sorted({*before, *after}):
        if name not in before:
            found.append(f"runner {name} (new)")
        elif name not in after:
            found.append(f"runner {name} (removed)")
        elif before[name] != after[name]:
            found.append(f"runner {name}")
    return found
