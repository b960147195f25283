"""What our stream is like, and whether one that exists, made or edited by somebody else,
serves our protocol.

One on a server of others is never changed: what would break the protocol is refused, what
is only other than configured is told.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..config import connection
from ..config.schema import Config
from .errors import ConfigError
from .subjects import LEAST_PAYLOAD, STREAM, SUBJECT_PREFIX

if TYPE_CHECKING:
    from nats.js.api import StreamConfig

_ANEW = (
    "it cannot be changed: stop the executors, then remove the stream and all stored output with"
    f" it (nats stream rm {STREAM})"
)
_ANEW_EMBEDDED = (
    "it cannot be changed: stop runctld, then remove nats/store in its state directory and all"
    " stored output with it"
)
_RESTART = "restart runctld, which sets it back"

#: Seconds that a consumer which nobody hears may live: what most libraries' ordered consumers
#: ask for, and longer than any of ours.
MOST_IDLE = 300.0
#: What ours ask for, at most.
LEAST_IDLE = 10.0

#: JetStream's error codes.
_NOT_CLUSTERED = 10074
_NOT_FOR_ACCOUNT = 10039
_NOT_ENABLED = 10076


def wanted(config: Config) -> StreamConfig:
    """The stream as it is to be made."""
    from nats.js.api import (
        DiscardPolicy,
        RetentionPolicy,
        StorageType,
        StreamConfig,
        StreamConsumerLimits,
    )

    return StreamConfig(
        name=STREAM,
        subjects=[SUBJECT_PREFIX + ".*.*"],
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW,
        storage=StorageType.FILE,
        max_age=0,  # counts from each record: it would take the head of a long run
        max_bytes=config.stream.max_bytes,
        max_consumers=100_000,
        num_replicas=config.nats.replicas,
        duplicate_window=1,
        allow_rollup_hdrs=True,
        allow_direct=True,
        # No max_ack_pending: with it JetStream refuses consumers that acknowledge nothing, ours.
        consumer_limits=StreamConsumerLimits(inactive_threshold=MOST_IDLE),
    )


def adding(config: Config) -> str:
    """The command that makes it."""
    return shlex.join(
        [
            *("nats", "stream", "add", STREAM, f"--subjects={SUBJECT_PREFIX}.*.*"),
            *("--storage=file", "--retention=limits", "--discard=new"),
            _limiting("max-bytes", config.stream.max_bytes),
            *("--max-consumers=100000", f"--replicas={config.nats.replicas}"),
            f"--limit-consumer-inactive={MOST_IDLE:g}s",
            *("--allow-rollup", "--allow-direct", "--no-deny-delete", "--no-deny-purge"),
            "--defaults",
        ]
    )


def broken(found: StreamConfig, wanted: StreamConfig, *, embedded: bool = False) -> list[str]:
    """A line for each setting that breaks the protocol: it names the setting, what was found
    and what is wanted, and what puts it right. ``embedded``: the server is the daemon's own."""
    return [
        f"the stream {STREAM} exists with {name} = {has} and runctl needs {needs};"
        f" it was not changed. Put it right: {_fix(fix, embedded)}"
        for name, has, needs, fix in _broken(found, wanted)
    ]


def differences(found: StreamConfig, wanted: StreamConfig, *, embedded: bool = False) -> list[str]:
    """A line for each setting that is not as configured, and does not break the protocol."""
    return [
        f"the stream {STREAM} has {name} = {has}, not {needs} as configured; it was not changed."
        f" To change it: {_fix(fix, embedded)}"
        for name, has, needs, fix in _other(found, wanted)
    ]


def _fix(external: str, embedded: bool) -> str:
    if not embedded:
        return external
    return _ANEW_EMBEDDED if external == _ANEW else _RESTART


def _broken(found: StreamConfig, wanted: StreamConfig) -> Iterator[tuple[str, object, object, str]]:
    if found.sealed:  # which changes others as well
        yield "sealed", "true", "false", _ANEW
    subjects, needed = sorted(found.subjects or []), sorted(wanted.subjects or [])
    if subjects != needed:
        fix = _edit(*(f"--subjects={subject}" for subject in needed))
        yield "subjects", ",".join(subjects) or "none", ",".join(needed), fix
    for key in ("retention", "storage"):
        has, needs = _word(getattr(found, key)), _word(getattr(wanted, key))
        if has != needs:
            yield key, has, needs, _ANEW
    if not found.allow_rollup_hdrs:
        yield "allow_rollup_hdrs", "false", "true", _edit("--allow-rollup")
    if found.deny_purge:
        yield "deny_purge", "true", "false", _ANEW
    if found.no_ack:
        yield "no_ack", "true", "false", _edit("--ack")
    if _limit(found.max_msgs_per_subject) is not None:
        fix = _edit("--max-msgs-per-subject=-1")
        yield "max_msgs_per_subject", found.max_msgs_per_subject, "no limit", fix
    largest = _limit(found.max_msg_size)
    if largest is not None and largest < LEAST_PAYLOAD:
        fix = _edit("--max-msg-size=-1")
        yield "max_msg_size", largest, f"at least {LEAST_PAYLOAD}", fix


def _other(found: StreamConfig, wanted: StreamConfig) -> Iterator[tuple[str, object, object, str]]:
    for key, flag in (("max_bytes", "max-bytes"), ("max_age", "max-age"), ("max_msgs", "max-msgs")):
        has, needs = _limit(getattr(found, key)), _limit(getattr(wanted, key))
        if has != needs:
            unit = "s" if key == "max_age" else ""
            value = f"{needs:g}" if isinstance(needs, float) else needs
            shown = "no limit" if has is None else f"{has:g}{unit}" if unit else has
            wished = "no limit" if needs is None else f"{value}{unit}"
            yield key, shown, wished, _edit(_limiting(flag, needs))
    if _word(found.discard) != _word(wanted.discard):
        needs = _word(wanted.discard)
        yield "discard", _word(found.discard), needs, _edit(f"--discard={needs}")
    if (found.num_replicas or 1) != (wanted.num_replicas or 1):
        needs = wanted.num_replicas or 1
        yield "num_replicas", found.num_replicas, needs, _edit(f"--replicas={needs}")
    if bool(wanted.allow_direct) and not found.allow_direct:
        yield "allow_direct", "false", "true", _edit("--allow-direct")
    has, needs = _limit(found.max_consumers), _limit(wanted.max_consumers)
    if has is not None and (needs is None or has < needs):
        yield "max_consumers", has, needs, _edit(f"--max-consumers={needs or -1}")
    yield from _consumers(found)


def _consumers(found: StreamConfig) -> Iterator[tuple[str, object, object, str]]:
    """What the stream lets others' consumers be. `nats stream edit` has no option for it."""
    limits = found.consumer_limits
    idle = _limit(limits.inactive_threshold) if limits is not None else None
    pending = _limit(limits.max_ack_pending) if limits is not None else None
    good = {"inactive_threshold": int(MOST_IDLE * 1e9), "max_ack_pending": 0}
    fix = (
        f"nats stream info {STREAM} --json | jq '.config * {json.dumps({'consumer_limits': good})}'"
        f" > {STREAM}.json; {_edit(f'--config={STREAM}.json')}"
    )
    if idle is None or not LEAST_IDLE <= idle <= MOST_IDLE:
        shown = "no limit" if idle is None else f"{idle:g}s"
        yield "consumer_limits.inactive_threshold", shown, f"{MOST_IDLE:g}s", fix
    if pending is not None:
        yield "consumer_limits.max_ack_pending", pending, "no limit", fix


def refusal(error: Exception, config: Config) -> ConfigError | None:
    """In plain words, why JetStream did not make the stream; None if it may yet."""
    code, where = getattr(error, "err_code", None), connection.name_servers(config.nats)
    if code == _NOT_CLUSTERED:
        return ConfigError(
            f"nats.replicas = {config.nats.replicas} needs a NATS cluster, and NATS at {where} is"
            " one server: set nats.replicas = 1, or nats.url to a cluster"
        )
    if code in (_NOT_FOR_ACCOUNT, _NOT_ENABLED):
        return ConfigError(
            f"NATS at {where} has no JetStream for this user's account:"
            ' enable it there ("jetstream" in its configuration)'
        )
    return None


def _edit(*options: str) -> str:
    return shlex.join(["nats", "stream", "edit", STREAM, *options])


def _limiting(flag: str, needs: Any) -> str:
    """The option that sets a limit. The `nats` command takes sizes of 2 GiB and more with a
    unit only."""
    if flag == "max-age":
        return f"--{flag}={needs or 0:g}s"
    if flag == "max-bytes" and needs is not None:
        for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
            if needs % 1024**power == 0:
                return f"--{flag}={needs // 1024**power}{unit}"
    return f"--{flag}={-1 if needs is None else needs}"


def _limit(value: Any) -> Any:
    """None for "no limit", which has three spellings."""
    return None if value is None or value <= 0 else value


def _word(value: Any) -> str:
    return str(getattr(value, "value", value) or "")
