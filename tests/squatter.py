"""Another local user who takes the port of somebody's nats-server, and pretends to be it.

``Squatter(port, ...)`` is a process that, as ``NOBODY``, binds the port as soon as it is free.
Whoever connects is told what a nats-server says, and may be sent a message on a subject that
it subscribes to. ``heard`` is every byte that it was sent.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from pathlib import Path

from conftest import wait_until

NOBODY = 65534

CODE = r"""
import asyncio, base64, json, os, socket, ssl, sys
asked = json.loads(sys.argv[1])
heard = open(asked["heard"], "ab", buffering=0)
context = None
if asked["pair"]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(asked["pair"])
os.setgroups([]); os.setgid(asked["user"]); os.setuid(asked["user"])
print("waits", flush=True)
while True:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", asked["port"]))
        break
    except OSError:
        sock.close()
sock.listen(100)
print("bound", flush=True)
subject, order = asked["subject"].encode(), base64.b64decode(asked["order"])
info = {"server_id": "X", "server_name": "runctl-embedded", "version": "2.15.1", "proto": 1,
        "headers": True, "auth_required": True, "max_payload": 8388608}
async def serve(reader, writer):
    if asked["talks"]:
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
    try:
        while data := await reader.read(65536):
            heard.write(data)
            for line in data.split(b"\r\n"):
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
                words = line.split()
                if order and line.startswith(b"SUB ") and words[1] == subject:
                    head = b"MSG %s %s _INBOX.x %d\r\n" % (subject, words[-1], len(order))
                    writer.write(head + order + b"\r\n")
    except OSError:
        pass
    writer.close()
async def main():
    server = await asyncio.start_server(serve, sock=sock, ssl=context)
    await server.serve_forever()
asyncio.run(main())
"""


class Squatter:
    """``pair``: a file with a certificate and its key, PEM; then it speaks TLS from the first
    byte. ``order`` is sent to whoever subscribes to ``subject``."""

    def __init__(
        self,
        port: int,
        folder: Path,
        *,
        pair: Path | None = None,
        talks: bool = True,
        subject: str = "",
        order: bytes = b"",
    ) -> None:
        self._heard = folder / f"heard-{port}"
        asked = {
            "port": port,
            "heard": str(self._heard),
            "user": NOBODY,
            "pair": None if pair is None else str(pair),
            "talks": talks,
            "subject": subject,
            "order": base64.b64encode(order).decode(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", CODE, json.dumps(asked)], stdout=subprocess.PIPE
        )

        assert self._process.stdout is not None
        read = self._process.stdout.readline
        assert read() == b"waits\n"
        self._bound = threading.Thread(target=read, daemon=True)
        self._bound.start()

    @property
    def bound(self) -> bool:
        return not self._bound.is_alive()

    def wait_bound(self) -> None:
        wait_until(lambda: self.bound, "the port is free")

    @property
    def heard(self) -> bytes:
        return self._heard.read_bytes()

    def wait_heard(self) -> None:
        wait_until(lambda: self.heard, "somebody came to the squatter")

    def close(self) -> None:
        self._process.kill()
        self._bound.join()
        self._process.communicate()

    def __enter__(self) -> Squatter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
