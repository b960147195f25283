"""What the daemon and its keeper tell each other. Standard library only: the keeper imports it.

Each is 4 bytes length, JSON. ``spawn`` carries three descriptors (SCM_RIGHTS)::

    -> {op: spawn, id, argv, mark, env, cwd, otherwise, tty, umask, group, account, limits,
        stop_signal}
                                                <- {id, pid}  or  {id, step, errno}
    -> {op: ping, id}                           <- {id}
    -> {op: end, id, tree, grace, keep}         <- {id, ended, kept}  once the tree is empty
    -> {op: drop, tree, names}
    -> {op: about, tree, about}
    -> {op: forget, tree}
    -> {op: hold, fds}
    -> {op: release, id}                        <- {id, let_go}
    -> {op: token, fds}
    -> {op: leave}
                                                <- {exit: tree, status, starved}
                                                <- {held: tree, pids}
                                                <- {gone: tree}
                                                <- {unidentified: pids}
    (the daemon sends no more)                  <- {left: pids}

A daemon that comes to a keeper whose own daemon is gone begins with ``hello``, or has it end
all with ``bye``; the lock of the state directory goes beside either::

    -> {op: hello, protocol, pid, fds}          <- {protocol, pid, refused}, or
                                                <- {protocol, pid, trees, last, groups,
                                                    version, left}
                                                <- {tree, root, mark, status, starved, cut, kept,
                                                    names, about, fds}  for each of ``trees``
    -> {op: taken, outlive}
    -> {op: bye, fds}                           (it ends what it has, and closes)

A spawn is answered when the child has executed ``argv``, or cannot. An ``end`` may come
before: then its answer is ``{id, step, hung}``, with the step that did not end.
With ``keep`` only what is in the root's session is ended; the rest is ``kept``, and the tree
goes on until another ``end`` comes or, as ``gone`` says, all of it has ended. ``ended``: what was
there besides a root that had ended before. Both are ``[pid, name, ...]``, as in ``held``.
``held`` says, whenever that changes, which processes of a tree that is being ended cannot be:
``[pid, name, user id, why]``, as ``find_hindrance`` knows it. ``left``: the same at the end of all,
when nothing else is left; the keeper stays until they are gone. ``unidentified``: processes that
may be of any tree, said once of each; the kernel does not answer what their environments are.

``tree`` is the id of the spawn that made it: unlike a pid it is never used twice. With
``tty`` stdout is a terminal, which becomes the child's controlling one. ``CGROUPS`` is what
the paths of runs' cgroups begin with, "" for none (``cgroups.py``); ``group`` is added to it.
``otherwise``: where it runs when ``cwd`` cannot be entered, null for nowhere. ``account``:
{uid, gid, groups} that the command runs with, null for ours. ``limits``: {files, each}: what is
written to its cgroup's files, by their names, and [resource, value] of each of its processes.
``starved``: "limit", if the cgroup's memory limit had it killed; "machine", if the machine had no
memory left; else "".

``fds``: how many descriptors go with the message's first byte. Of a tree the keeper holds copies
of the files that the daemon reads and writes, by their ``names``, until it is told to ``drop``
them; ``about`` is what the daemon that started it would tell the next one, which the keeper hands
on unread. ``forget``: the end of its run is stored, nobody is told of it any more. ``hold`` gives
the connection that keeps the executor's lease, ``release`` takes it back; ``token`` gives one
whose other end the service manager closes when no daemon is started any more. ``leave``: the
daemon ends on purpose, and what runs goes on. ``refused``: "busy", "stranger" or "protocol".
Until ``taken`` all stays as it was; ``outlive``: seconds that trees go on without a daemon, from
then on.
"""

import json
import struct
import sys
from typing import Any

_HEADER = struct.Struct(">I")


def encode(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return _HEADER.pack(len(data)) + data


def take_messages(buffer: bytearray, most: int = sys.maxsize) -> list[dict[str, Any]]:
    """Those that are whole, ``most`` of them, out of ``buffer``; what follows stays there. Raises
    ValueError, RecursionError, when it holds something else."""
    messages: list[dict[str, Any]] = []
    while len(buffer) >= _HEADER.size and len(messages) < most:
        end = _HEADER.size + _HEADER.unpack_from(buffer)[0]
        if len(buffer) < end:
            break
        messages.append(json.loads(buffer[_HEADER.size : end]))
        del buffer[:end]
    return messages
