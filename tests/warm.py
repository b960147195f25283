"""Processes of runctl for a fifth of their price: forked from one that has imported it all.

Three quarters of what ``runctl list`` costs are Python's start and its imports, and the
tests call it thousands of times. Each call is still a process of its own, with its own
descriptors, directory and environment, that runs what ``python -m runctl.cli.main`` runs.
What a start itself does is tested with real starts (``Box.popen``).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "runctl.cli.main"


class Warm:
    """The process that others are forked from; started by the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._address = f"\0runctl-warm-{os.getpid()}-{time.time_ns()}"

    def runctl(self, args: Sequence[str], cwd: Path, limit: float) -> tuple[int, bytes, bytes]:
        """(exit status as Popen's, stdout, stderr) of ``runctl`` with ``args``, without
        input. Raises TimeoutError when it takes longer than ``limit`` seconds, and ends it."""
        self._start()
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        request = json.dumps([list(args), os.fspath(cwd), dict(os.environ)]).encode()
        with (
            open(out, "rb", 0) as stdout,
            open(err, "rb", 0) as stderr,
            socket.socket(socket.AF_UNIX) as line,
        ):
            line.connect(self._address)
            try:
                head = len(request).to_bytes(4, "big")
                socket.send_fds(line, [head], [out_end, err_end])
            finally:
                os.close(out_end)
                os.close(err_end)
            line.sendall(request)
            pid = int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big")
            texts = {stdout.fileno(): b"", stderr.fileno(): b"", line.fileno(): b""}
            try:
                _read(texts, limit)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise
            status = os.waitstatus_to_exitcode(int(texts[line.fileno()]))
            return status, texts[stdout.fileno()], texts[stderr.fileno()]

    def _start(self) -> None:
        with self._lock, socket.socket(socket.AF_UNIX) as listener:
            if self._process is None:
                listener.bind(self._address)
                listener.listen(64)
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(listener.fileno())],
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.PIPE,  # whose end it sees when these tests are no more
                )

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait()
                self._process = None


def _read(texts: dict[int, bytes], limit: float) -> None:
    """Read each descriptor to its end into ``texts``."""
    end = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        for fd in texts:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            if not (ready := selector.select(max(0, end - time.monotonic()))):
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                texts[key.fd] += data
                if not data:
                    selector.unregister(key.fd)


# ---- in the process that is forked -----------------------------------------------------------


def _import_all() -> None:
    import runctl.cli
    import runctl.config

    for package in (runctl.cli, runctl.config):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    sys.modules.pop(PROGRAM)  # each child runs it as __main__
    gc.collect()
    gc.freeze()


def _serve(listener: socket.socket) -> list[str]:
    """In the process itself: fork for each that connects, until stdin ends; never returns.
    In a child: its arguments, once it has its descriptors, directory and environment."""
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    lines: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for what in (listener, ended, sys.stdin):
            selector.register(what, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    os._exit(0)
                elif key.fileobj is ended:
                    ended.recv(4096)
                    _tell_who_ended(lines)
                else:
                    line, _ = listener.accept()
                    head, fds, _, _ = socket.recv_fds(line, 4, 2)
                    size = int.from_bytes(head, "big")
                    args, cwd, environ = json.loads(line.recv(size, socket.MSG_WAITALL))
                    if (pid := os.fork()) == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for inherited in (listener, ended, wake, line, *lines.values()):
                            inherited.close()
                        _become(fds, cwd, environ)
                        return list(map(str, args))
                    for fd in fds:
                        os.close(fd)
                    line.sendall(pid.to_bytes(4, "big"))
                    lines[pid] = line


def _tell_who_ended(lines: dict[int, socket.socket]) -> None:
    while lines:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with lines.pop(pid) as line:
            line.sendall(str(status).encode())


def _become(fds: Sequence[int], cwd: str, environ: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.closerange(3, 256)
    sys.stdin, sys.stdout = os.fdopen(0, "r", closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)


if __name__ == "__main__":
    del sys.path[0]  # the folder of the tests
    _import_all()
    sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)
