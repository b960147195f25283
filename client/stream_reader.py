"""The messages of JetStream's stream in order, each once, across any restart.

Our own ordered consumer rather than nats-py's, which never resumes after a full queue
and takes seconds after a server restart. An ephemeral push consumer delivers to an inbox.
Consumer sequences without a hole prove that nothing was lost on the way; on a hole, a silent
server or a broken connection a new consumer starts behind the last stream sequence that was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from ..protocol import subjects
from ..protocol.errors import Away, Unavailable
from .delivery import make_consumer_config, read_delivery, read_unix_ns
from .link import API_TIMEOUT, Link, LinkLost, NotReady

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

#: The server says every so often that it has nothing to say.
HEARTBEAT = 0.5
#: Heartbeats missed before the consumer is given up.
MISSED = 3
#: How long the stream may be missing when watching begins.
START_TIMEOUT = 10.0
BACKOFF = (0.05, 0.2)
#: Bytes of records that wait for a slow reader; the server keeps the rest.
MOST_UNREAD = 16 * 1024 * 1024


class _Consumer:
    """One JetStream consumer's life on our side. ``failed`` is set when it is no good."""

    def __init__(self) -> None:
        self.name = ""
        self.sequence = 0
        self.ticks = 0
        self.failed = asyncio.Event()
        #: Consumer sequence of the last message that was stored when it was made.
        self.target: int | None = None
        self.drained = False
        #: Nothing is taken from it, since too much is not read yet.
        self.reader_waits = False
        self.caught_up = False


class StreamReader:
    """Messages of ``subject``, which may hold wildcards, to whoever fills in what is told:
    ``take``, ``tell_connection``, ``tell_caught_up``, ``start_over``. ``read`` goes on for ever.

    ``link``: a connection to begin with. ``start``: the stream sequence to begin at.
    ``last_only``: begin with the last message of each subject. ``headers_only``: leave the
    content out."""

    def __init__(
        self,
        dial: Callable[[], Awaitable[Link]],
        subject: str,
        *,
        link: Link | None = None,
        start: int | None = None,
        last_only: bool = False,
        headers_only: bool = False,
    ) -> None:
        self._dial = dial
        self._subject = subject
        self._link = link
        self._start = start
        self._policy: Literal["all", "last_per_subject"] = (
            "last_per_subject" if last_only else "all"
        )
        self._headers_only = headers_only
        self._last = 0
        #: When the stream was made that we read: another one has another time.
        self._made = ""
        #: Subject and time, in ns, of the message at ``_last``.
        self._seen = "", 0
        self._started = False
        self._down = False
        #: Bytes of messages that came since they were read last; ``_read`` when they are.
        self._unread = 0
        self._read = asyncio.Event()

    @property
    def link(self) -> Link | None:
        """The connection in use, if there is one at the moment."""
        return self._link

    def begin_behind(self, sequence: int, subject: str, unix_ns: int, made: str) -> None:
        """Read what is behind a message that somebody has seen, in a stream made at ``made``."""
        self._last, self._seen, self._made = sequence, (subject, unix_ns), made
        self._started = True

    def note_read(self) -> None:
        """All that was taken is read: the server may send more."""
        self._unread = 0
        self._read.set()

    def take(self, msg: Msg, sequence: int) -> None:
        """The next message, and its place in the stream."""
        raise NotImplementedError

    def tell_connection(self, up: bool, stream: bool) -> None:
        """See ``events.Connection``."""

    def tell_caught_up(self) -> None:
        """See ``events.CaughtUp``."""

    def start_over(self) -> None:
        """The stream is another one, or has lost what was seen: it is read from its beginning."""

    def _report_down(self, *, stream: bool = False) -> None:
        if not self._down:
            self._down = True
            self.tell_connection(False, stream)

    async def read(self) -> None:
        """Raises Unavailable if reading cannot begin within ``START_TIMEOUT``; later troubles are
        waited out."""
        delay = BACKOFF[0]
        now = asyncio.get_running_loop().time
        deadline, connected = now() + START_TIMEOUT, False
        while True:
            try:
                if self._link is None:
                    self._link = await self._dial()
                connected = True
                delay = BACKOFF[0]
                await self._consume(self._link)
            except Unavailable as error:
                # What was delivered before the server told of it counts as a beginning.
                begun, away = self._started or self._last, isinstance(error, Away | LinkLost)
                if not begun and not (connected and away and now() < deadline):
                    raise
            self._report_down()
            if self._link is not None:
                await self._link.close()
                self._link = None
            await asyncio.sleep(delay)
            delay = min(delay * 2, BACKOFF[1])

    async def _consume(self, link: Link) -> None:
        """Consume until the connection is lost (LinkLost) or stops answering."""
        began = asyncio.get_running_loop().time()
        delay = BACKOFF[0]
        while True:
            consumer = _Consumer()
            inbox = link.nc.new_inbox()
            subscription = None
            try:
                await self._check_stream(link)
                if self._down:
                    self._down = False
                    self.tell_connection(True, False)
                subscription = await self._subscribe(link, consumer, inbox)
                await self._create(link, consumer, inbox)
                self._started = True
                delay = BACKOFF[0]
                await self._monitor(link, consumer)
                if not link.closed.is_set() and consumer.ticks >= MISSED:
                    self._report_down()  # a server that hangs is as good as gone
            except NotReady as problem:
                waited = asyncio.get_running_loop().time() - began
                if not self._started and waited > START_TIMEOUT:
                    raise Unavailable(
                        f"JetStream does not serve the stream {subjects.STREAM} ({problem});"
                        " is runctld running?"
                    ) from None
                if self._started and problem.code == subjects.NO_STREAM:
                    self._report_down(stream=True)
                if problem.code == 0 and waited > 2 * API_TIMEOUT:
                    return  # perhaps the connection is dead and TCP does not know
                await asyncio.sleep(delay)
                delay = min(delay * 2, BACKOFF[1])
            finally:
                # Also when cancelled: a consumer that is left costs the server seconds.
                consumer.failed.set()
                self._read.set()
                await self._drop(link, consumer, subscription)

    async def _subscribe(self, link: Link, consumer: _Consumer, inbox: str) -> Subscription:
        from nats.errors import Error

        try:
            return await link.nc.subscribe(
                inbox,
                cb=self._receiver(link, consumer),
                # Flow control bounds what waits; a limit here would drop silently.
                pending_msgs_limit=0,
                pending_bytes_limit=0,
            )
        except (Error, OSError):
            raise LinkLost("the connection to NATS broke") from None

    async def _check_stream(self, link: Link) -> None:
        """A stream that was made at another time, ends before what we have seen, or has
        something else there, is a new one, or has lost what we have seen: start over in it."""
        info = await link.api(f"STREAM.INFO.{subjects.STREAM}")
        before, self._made = self._made, str(info["created"])
        if not self._started:
            return
        ends_before = int(info["state"]["last_seq"]) < self._last
        if before != self._made or ends_before or await self._holds_another(link):
            self._last = 0
            self._start = None
            self.start_over()

    async def _holds_another(self, link: Link) -> bool:
        """Whether the sequence of the last message that we saw is another message's now."""
        if not self._last:
            return False
        try:
            reply = await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", {"seq": self._last})
        except NotReady as problem:
            if problem.code == subjects.NO_MESSAGE:  # purged, or rolled up
                return False
            raise
        message = reply["message"]
        return bool(
            message["subject"] != self._seen[0] or read_unix_ns(message["time"]) != self._seen[1]
        )

    async def _create(self, link: Link, consumer: _Consumer, inbox: str) -> None:
        config = make_consumer_config(
            inbox,
            self._subject,
            policy=self._policy,
            start=self._last + 1 if self._last else self._start,
            headers_only=self._headers_only,
            heartbeat=HEARTBEAT,
        )
        reply = await link.api(
            f"CONSUMER.CREATE.{subjects.STREAM}", {"stream_name": subjects.STREAM, "config": config}
        )
        consumer.name = reply["name"]
        # The server may have begun to deliver before it answered.
        consumer.target = int(reply["num_pending"]) + int(reply["delivered"]["consumer_seq"])
        self._note_progress(consumer)

    async def _monitor(self, link: Link, consumer: _Consumer) -> None:
        """Return when the consumer failed; raise LinkLost when the connection did.

        Counts turns of the event loop rather than time: a reader that blocks us (a full
        pipe) is no reason to take the server for dead."""
        while not consumer.failed.is_set():
            if link.closed.is_set():
                raise LinkLost("the connection to NATS broke")
            waits = [asyncio.ensure_future(e.wait()) for e in (consumer.failed, link.closed)]
            try:
                await asyncio.wait(waits, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            consumer.ticks += not consumer.reader_waits
            if consumer.ticks >= MISSED:
                return

    async def _drop(
        self, link: Link, consumer: _Consumer, subscription: Subscription | None
    ) -> None:
        """Forget a consumer, without waiting for an answer: on Ctrl-C the connection's
        tasks are being cancelled together with us."""
        if link.closed.is_set():
            return
        with contextlib.suppress(Exception):
            if subscription is not None:
                await asyncio.wait_for(subscription.unsubscribe(), 0.2)
            if consumer.name:
                delete = f"$JS.API.CONSUMER.DELETE.{subjects.STREAM}.{consumer.name}"
                await asyncio.wait_for(link.nc.publish(delete, b"", reply=link.nc.new_inbox()), 0.2)

    def _note_progress(self, consumer: _Consumer) -> None:
        if consumer.caught_up or consumer.target is None:
            return
        if consumer.drained or consumer.sequence >= consumer.target:
            consumer.caught_up = True
            self.tell_caught_up()

    def _receiver(self, link: Link, consumer: _Consumer) -> Callable[[Msg], Awaitable[None]]:
        async def receive(msg: Msg) -> None:
            if consumer.failed.is_set():
                return
            consumer.ticks = 0
            headers = msg.headers
            # What is stored may look like one of the server's own messages, but for this.
            if not msg.reply.startswith("$JS.ACK."):
                if headers is not None and "Status" in headers and not msg.data:
                    await self._handle_control(link, consumer, msg, headers)
                return
            delivery = read_delivery(msg.reply)
            if delivery.consumer_sequence != consumer.sequence + 1:
                consumer.failed.set()
                return
            consumer.sequence = delivery.consumer_sequence
            if delivery.stream_sequence > self._last:
                self._last = delivery.stream_sequence
                self._seen = msg.subject, delivery.unix_ns
                self.take(msg, self._last)
            if not consumer.caught_up:
                consumer.drained = delivery.pending == 0
                self._note_progress(consumer)
            self._unread += len(msg.data)
            if self._unread > MOST_UNREAD:
                await self._wait_for_reader(consumer)

        return receive

    async def _wait_for_reader(self, consumer: _Consumer) -> None:
        """Meanwhile the server is not told to go on, by flow control, and keeps the rest."""
        consumer.reader_waits = True
        while self._unread > MOST_UNREAD and not consumer.failed.is_set():
            self._read.clear()
            await self._read.wait()
        consumer.ticks = 0
        consumer.reader_waits = False

    async def _handle_control(
        self, link: Link, consumer: _Consumer, msg: Msg, headers: dict[str, str]
    ) -> None:
        if headers["Status"] != "100":  # the consumer was deleted, or moved
            consumer.failed.set()
            return
        if msg.reply:  # flow control: what came before it has been processed
            await link.nc.publish(msg.reply, b"")
            return
        stalled = headers.get("Nats-Consumer-Stalled")
        if stalled:
            await link.nc.publish(stalled, b"")
        last = int(headers.get("Nats-Last-Consumer", consumer.sequence))
        if last != consumer.sequence:
            consumer.failed.set()
        elif not stalled:
            # Idle: nothing is left, even if less came than was announced (a purge).
            consumer.drained = True
            self._note_progress(consumer)
