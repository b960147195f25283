"""Makes again what the reference, the ``openai`` package, makes of each answer in ``wire/``.

    pip install openai           # in an environment of its own
    python tests/wire_readings.py

``wire/NAME.http`` is what an endpoint sends, from the status line on; it closes then.
``wire/NAME.json`` has the reference's reading of it, which this script writes, and ours, which
``test_wire.py`` compares with what the chat runner does. Where the two differ on purpose,
"differs" says why.
"""

from __future__ import annotations

import importlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("wire")


def take_request(connection: socket.socket) -> None:
    """Read one HTTP request that has a Content-Length, to its end."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += receive(connection)


def receive(connection: socket.socket) -> bytes:
    """Some bytes. Raises ConnectionError when there will be none."""
    if not (data := connection.recv(65536)):
        raise ConnectionError("the client has gone")
    return data


@contextmanager
def playing(*answer: bytes) -> Iterator[int]:
    """The port of a server that answers one request with the pieces of ``answer``, each sent
    by itself, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):  # who has seen enough goes
                take_request(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for piece in answer:
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def reading(openai: Any, answer: bytes) -> dict[str, Any]:
    """The text, the last finish_reason, and the class of the error, if there is one."""
    text, finish, error = "", None, None
    with playing(answer) as port:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="sk-x",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=False),
        )
        try:
            messages = [{"role": "user", "content": "hello"}]
            for chunk in client.chat.completions.create(model="m", messages=messages, stream=True):
                for choice in (chunk.choices or [])[:1]:
                    if choice.index in (None, 0):
                        text += words(getattr(choice.delta, "content", None))
                    finish = choice.finish_reason or finish
        except Exception as found:
            error = type(found).__name__
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return {"text": text, "finish": finish, "error": error}


def words(content: Any) -> str:
    if isinstance(content, list):
        return "".join(words(part) for part in content)
    if isinstance(content, dict):
        return str(content.get("text", ""))
    return "" if content is None else str(content)


def main() -> None:
    openai = importlib.import_module("openai")
    print(f"openai {openai.__version__}")
    (FOLDER / "reference").write_text(f"openai {openai.__version__}\n")
    for file in sorted(FOLDER.glob("*.http")):
        beside = file.with_suffix(".json")
        found = json.loads(beside.read_text()) if beside.exists() else {}
        found = {**found, "reference": reading(openai, file.read_bytes())}
        beside.write_text(json.dumps(found, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
