"""Processes of ours for a fraction of their price: forked from one that has imported it all.

Three quarters of what ``runctl list`` costs are Python's start and its imports, half of
what a daemon's start does, and the tests do thousands of them. Each is still a process of
its own, with its own descriptors, directory and environment, that runs what
``python -m runctl.cli.main`` runs. What a start itself does is tested with real starts
(``Box.popen``, ``Box.start(cold=True)``).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

#: What each program is likely to import.
PACKAGES = {
    "runctl.cli.main": ("runctl.config", "runctl.protocol", "runctl.client", "runctl.cli"),
    "runctl.supervisor.main": ("runctl.config", "runctl.protocol", "runctl.supervisor"),
}


class Forked:
    """A process as :class:`subprocess.Popen` has them, but not a child of this one.

    ``line``: says its wait status when it has ended.
    """

    def __init__(self, line: socket.socket, args: Sequence[str]) -> None:
        self.args = list(args)
        self.returncode: int | None = None
        self._line = -1
        self._lock = threading.Lock()
        self.pid = int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big")
        # The number alone: a socket that is collected unclosed is a warning, in some order.
        self._line = line.detach()

    def __del__(self) -> None:
        if self._line >= 0:
            os.close(self._line)

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._line

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            readable, _, _ = select.select([self._line], [], [], timeout)
            if not readable:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            with self._lock:  # a house's unit and its test may wait for the same daemon
                if self.returncode is None:
                    said = _read_end(self._line)
                    self.returncode = os.waitstatus_to_exitcode(int(said))
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that those of ``program`` are forked from; started by the first call."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._address = f"\0{program}-{os.getpid()}-{time.time_ns()}"

    def start(self, args: Sequence[str], cwd: Path, out: int, err: int) -> Forked:
        """A process of the program, without input, that writes to the descriptors ``out``
        and ``err``."""
        self._start()
        request = json.dumps([list(args), os.fspath(cwd), dict(os.environ)]).encode()
        line = socket.socket(socket.AF_UNIX)
        line.connect(self._address)
        socket.send_fds(line, [len(request).to_bytes(4, "big")], [out, err])
        line.sendall(request)
        return Forked(line, args)

    def call(self, args: Sequence[str], cwd: Path, limit: float) -> tuple[int, bytes, bytes]:
        """(exit status as Popen's, stdout, stderr) of the program with ``args``, without
        input. Raises TimeoutError when it takes longer than ``limit`` seconds, and ends it."""
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        with open(out, "rb", 0) as stdout, open(err, "rb", 0) as stderr:
            try:
                process = self.start(args, cwd, out_end, err_end)
            finally:
                os.close(out_end)
                os.close(err_end)
            texts = {stdout.fileno(): b"", stderr.fileno(): b""}
            try:
                _read(texts, process, limit)
            except TimeoutError:
                process.kill()
                process.wait()
                raise
            return process.wait(), texts[stdout.fileno()], texts[stderr.fileno()]

    def _start(self) -> None:
        with self._lock, socket.socket(socket.AF_UNIX) as listener:
            if self._process is None:
                listener.bind(self._address)
                listener.listen(64)
                self._process = subprocess.Popen(
                    [sys.executable, __file__, self._program, str(listener.fileno())],
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


def _read_end(fd: int) -> bytes:
    said = b""
    while data := os.read(fd, 16):
        said += data
    return said


def _read(texts: dict[int, bytes], process: Forked, limit: float) -> None:
    """Read each descriptor to its end into ``texts``, until ``process`` has ended as well."""
    end = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        for fd in (*texts, process.fileno()):
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            if not (ready := selector.select(max(0, end - time.monotonic()))):
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16) if key.fd in texts else b""
                if data:
                    texts[key.fd] += data
                else:
                    selector.unregister(key.fd)


# ---- in the process that is forked -----------------------------------------------------------


def _import_all(program: str) -> None:
    for name in PACKAGES[program]:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, name + "."):
            importlib.import_module(module.name)
    sys.modules.pop(program)  # each child runs it as __main__
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
        with lines.pop(pid) as line, suppress(OSError):  # nobody may want to know
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
    _program = sys.argv[1]
    _import_all(_program)
    sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[2])))
    runpy.run_module(_program, run_name="__main__", alter_sys=True)
