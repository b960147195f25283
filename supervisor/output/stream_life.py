"""The life of the stream: whether it is there and serves, and whether it is still the one that
was written to. Somebody may delete it, its server may come back with an empty store, and
its settings can be edited, all under live runs.

* Noticed at once where something failed (``check``), by JetStream's advisories, after each
  reconnection, and else by a look every ``SLOW`` seconds.
* A stream that is gone is made again, if this user may; else what to do is said. JetStream's
  own "stream not found" counts alone: no answer, or no responders, is a server that starts or
  a cluster that elects a leader.
* A new stream's first sequence is its birth in microseconds. So sequences rise from stream to
  stream, and one that somebody remembers (a writer its last record, a watcher its place, a
  purge its limit) never fits another stream's record by chance.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import trio
import trio_asyncio

from ...config.connection import name_servers
from ...protocol.errors import ConfigError, StreamUnfit, Unavailable
from ...protocol.stream_config import MOST_IDLE, adding, broken, differences, refusal, wanted
from ...protocol.subjects import ADVISORIES, NO_STREAM, STREAM

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.api import StreamConfig, StreamInfo

    from ...config.schema import Config

log = logging.getLogger("runctld.stream")
aio = trio_asyncio.aio_as_trio

#: What JetStream says to an update that it does not allow.
NOT_TO_BE_CHANGED = 10052
#: And to one that its consumers do not keep to.
CONSUMERS_BEYOND = 10069
TIMEOUT = 2.0
#: Between two looks that nothing asked for, seconds.
SLOW = 10.0
#: A stream that was not found is looked for once more, so many seconds later.
CONFIRM = 0.2
#: Between two attempts to make it, seconds: at first, and at most.
AGAIN, SELDOM = 0.5, 10.0


class StreamLife:
    """``open``, then ``run`` in a nursery."""

    def __init__(self, client: Client) -> None:
        self._nc = client
        self._js = client.jetstream(timeout=TIMEOUT)
        self._config: Config
        self._wanted: StreamConfig
        self._created: object = None
        self._highest = 0
        self._suspect = trio.Event()
        self._news = trio.Event()
        #: Called on each news, by whoever has something to do at once.
        self.on_change: Callable[[], object] = lambda: None
        #: Rises with each stream that is not the one of before, or has lost its end.
        self.number = 0
        #: Why nothing can be stored, in a line: it is gone, or has settings that break the
        #: protocol; None when it serves.
        self.unfit: str | None = None
        #: It is gone, and not made again yet.
        self.missing = False
        #: It does not serve, and it is for others to mend that.
        self._stuck = False
        #: What the stream has other than configured, a line each.
        self.differences: list[str] = []
        #: The last loss, in a line.
        self.loss: str | None = None

    async def open(self, config: Config) -> None:
        """See that the stream exists, within ``start_timeout``.

        Raises Unavailable; ConfigError, when it cannot serve us."""
        self._config, self._wanted = config, wanted(config)
        from nats.js.errors import NotFoundError

        last: Exception | None = None
        with trio.move_on_after(config.start_timeout):
            while True:
                try:
                    try:
                        found = await aio(self._js.stream_info)(STREAM)
                        if config.nats.embedded:
                            found = await self._set_back(found)
                    except NotFoundError:
                        found = await self._make()
                    if wrong := self._broken(found):
                        raise ConfigError(wrong[0])
                    self._created, self._highest = found.created, found.state.last_seq
                    self._compare(found)
                    return
                except ConfigError:
                    raise
                except Exception as error:  # JetStream is not ready at once after a start
                    log.debug("stream not ready: %r", error)
                    if (refused := refusal(error, config)) is not None:
                        raise refused from None
                    last = error
                    await trio.sleep(0.02)
        reason = getattr(last, "description", None) or last or "no answer"
        raise Unavailable(
            f"JetStream at {name_servers(config.nats)} did not accept the stream {STREAM} within"
            f" {config.start_timeout:g} s ({reason})"
        )

    async def _set_back(self, found: StreamInfo) -> StreamInfo:
        """Our own server's stream gets the settings of the configuration. Raises nats'
        errors; ConfigError, when it cannot have them any more."""
        from nats.js.errors import APIError

        self._wanted.first_seq = found.config.first_seq
        try:
            try:
                return cast("StreamInfo", await aio(self._js.update_stream)(self._wanted))
            except APIError as error:
                if error.err_code != CONSUMERS_BEYOND:
                    raise
            await aio(self._remove_consumers)()
            return cast("StreamInfo", await aio(self._js.update_stream)(self._wanted))
        except APIError as error:
            if error.err_code == NOT_TO_BE_CHANGED and (wrong := self._broken(found)):
                raise ConfigError(wrong[-1]) from None
            raise

    async def _remove_consumers(self) -> None:
        """Those of a stream of an older daemon that may live for longer than by now. Raises
        nats' errors."""
        from nats.js.errors import NotFoundError

        found: dict[str, float] = {}
        while page := await self._js.consumers_info(STREAM, offset=len(found)):
            found |= {one.name: one.config.inactive_threshold or 0 for one in page}
        beyond = [name for name, idle in found.items() if idle > MOST_IDLE]
        log.warning("removing %d consumers that may live on unheard", len(beyond))
        for name in beyond:
            try:
                await self._js.delete_consumer(STREAM, name)
            except NotFoundError:  # it has ended by itself
                pass

    @property
    def warnings(self) -> list[str]:
        """What an operator is to know, a line each."""
        return [line for line in (self.unfit, self.loss) if line is not None] + self.differences

    def request_check(self) -> None:
        """Something may have become of it: look now."""
        self._suspect.set()

    def note_stored(self, sequence: int) -> None:
        """A record was stored there."""
        self._highest = max(self._highest, sequence)

    async def wait_until_fit(self) -> None:
        """Returns when it is there and serves."""
        while self.unfit is not None:
            await self._news.wait()

    async def wait_for_change(self) -> None:
        """Waits for what becomes of a stream that does not serve: raises StreamUnfit once it
        is clear that we cannot help it, returns when there is something new."""
        await self.check()
        self.request_check()
        with trio.move_on_after(TIMEOUT):
            while self.unfit is not None and not self._stuck:
                await self._news.wait()
        if self.unfit is not None and self._stuck:
            raise StreamUnfit(self.unfit)

    @property
    def next_change(self) -> trio.Event:
        """Set at the next change: another stream, one that is gone, one that serves. To be asked
        for before what is there is looked at."""
        return self._news

    async def run(self) -> None:
        try:
            await aio(self._nc.subscribe)(ADVISORIES, cb=self._on_advisory)
        except Exception as error:  # the connection is closed; whoever watches it says so
            log.debug("advisories: %r", error)
        delay = AGAIN
        while True:
            with trio.move_on_after(delay if self.missing else SLOW):
                await self._suspect.wait()
            self._suspect = trio.Event()
            await self.check()
            if not self.missing:
                delay = AGAIN
                continue
            await trio.sleep(CONFIRM)
            await self.check()
            if self.missing and not await self._make_again():
                delay = min(2 * delay, SELDOM)

    async def _on_advisory(self, _: Any) -> None:
        self.request_check()

    async def check(self) -> tuple[int, int] | None:
        """Ask for it now: (bytes, messages) that are stored, or None when JetStream does
        not answer."""
        from nats.js.errors import NotFoundError

        highest = self._highest  # what is acknowledged meanwhile may be newer than the answer
        try:
            found = await aio(self._js.stream_info)(STREAM)
        except NotFoundError as error:
            if error.err_code != NO_STREAM:
                return None
            self._is_gone()
            return 0, 0
        except Exception as error:
            log.debug("stream: %r", error)
            return None
        self._is_there(found, highest)
        return found.state.bytes, found.state.messages

    def _is_gone(self) -> None:
        if self.missing:
            return
        self.missing = True
        self.unfit = f"the stream {STREAM} is gone, and all stored output with it"
        log.error("%s", self.unfit)
        self.request_check()
        self.announce_change()

    def _is_there(self, found: StreamInfo, highest: int) -> None:
        told = False
        if found.created != self._created:
            self._created, told = found.created, True
            self._is_another()
        elif found.state.last_seq < highest:
            told = True
            log.warning(
                "the stream %s ends before what was stored: it is an earlier state of it, or its"
                " leader has lost the others; what running runs wrote is compared",
                STREAM,
            )
        if told:
            self.number += 1
            self._highest = found.state.last_seq
        wrong = self._broken(found)
        unfit = wrong[0] if wrong else None
        if unfit != self.unfit:
            if unfit is not None:
                log.error("%s; until then output waits", unfit)
            else:
                log.warning("the stream %s serves again", STREAM)
            self.unfit, told = unfit, True
        self.missing, self._stuck = False, unfit is not None
        self._compare(found)
        if told:
            self.announce_change()

    def _is_another(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self.loss = (
            f"the stream {STREAM} was deleted, or NATS lost it, and it is another one since {now}"
            " UTC: output that was stored before is lost, but for what running runs wrote last"
            " (64 KiB each)"
        )
        log.warning("%s", self.loss)

    def announce_change(self) -> None:
        """Wake whoever waits for news: they look for themselves what is new."""
        self.on_change()
        news, self._news = self._news, trio.Event()
        news.set()

    def _broken(self, found: StreamInfo) -> list[str]:
        return broken(found.config, self._wanted, embedded=self._config.nats.embedded)

    def _compare(self, found: StreamInfo) -> None:
        lines = self._broken(found)[1:]  # the first says already why it does not serve
        lines += differences(found.config, self._wanted, embedded=self._config.nats.embedded)
        for line in lines:
            if line not in self.differences:
                log.warning("%s", line)
        for line in self.differences:
            if line not in lines:
                log.info("not so any more: %s", line)
        self.differences = lines

    async def _make(self) -> StreamInfo:
        """Raises nats' errors."""
        self._wanted.first_seq = max(self._highest + 1, time.time_ns() // 1000)
        made: StreamInfo = await aio(self._js.add_stream)(self._wanted)
        return made

    async def _make_again(self) -> bool:
        try:
            await self._make()
        except Exception as error:  # another executor made it just now, perhaps
            log.debug("stream: %r", error)
            await self.check()
            if self.missing:
                refused = refusal(error, self._config)
                why = getattr(error, "description", None) or str(error) or type(error).__name__
                said = (
                    f"the stream {STREAM} is gone, and all stored output with it; this user may"
                    f" not make it again ({refused or why}). Make it: {adding(self._config)}"
                )
                if self.unfit != said:
                    self.unfit, self._stuck = said, True
                    log.error("%s", said)
                    self.announce_change()
            return not self.missing
        await self.check()
        return not self.missing
