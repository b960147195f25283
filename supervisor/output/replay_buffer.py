"""What an attempt has stored lately, should NATS lose it in spite of its acknowledgement: a
server flushes to disk every two minutes, unless told to do it always."""

from __future__ import annotations

from collections import deque

from ...protocol.records import Chunks, Continue, Record, Reset

#: Bytes of output kept per run, at least one record.
MOST = 64 * 1024
#: Roughly what a record takes beside its output.
OVERHEAD = 200


class ReplayBuffer:
    """The reset, or continue, and the newest records after it."""

    def __init__(self, first: Reset | Continue) -> None:
        self._first = first
        self._records: deque[tuple[Record, int]] = deque()
        self._bytes = 0

    def add(self, record: Record) -> None:
        size = OVERHEAD
        if isinstance(record, Chunks):
            size += sum(len(chunk.data) + OVERHEAD for chunk in record.chunks)
            size += len(record.checkpoint or b"")
        self._records.append((record, size))
        self._bytes += size
        while self._bytes > MOST and len(self._records) > 1:
            self._bytes -= self._records.popleft()[1]

    def __contains__(self, record: Record) -> bool:
        return any(kept == record for kept, _ in self._records)

    def records_after(self, last: Record | None) -> list[Record]:
        """What follows ``last``, the last record that is stored. What is not kept any more is
        left out: watchers are told of the gap."""
        records = [record for record, _ in self._records]
        if last is not None and last in records:
            return records[records.index(last) + 1 :]
        ours = last is not None and last.attempt == self._first.attempt
        if not ours:
            return [self._first, *records]
        if isinstance(last, Chunks):
            begin = last.seq + len(last.chunks)
            return [r for r in records if not isinstance(r, Chunks) or r.seq >= begin]
        return records
