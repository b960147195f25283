"""A prompt that is given on stdin."""

from __future__ import annotations

import sys

from ...protocol.errors import BadRequest
from ...protocol.model import MAX_PROMPT_BYTES


def read_prompt() -> str:
    """The prompt on stdin. Raises BadRequest."""
    try:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise BadRequest(
            f"no prompt can be read from standard input ({error.strerror});"
            " give it a file or a pipe"
        ) from None
    if len(data) > MAX_PROMPT_BYTES:
        raise BadRequest(
            "the prompt is larger than 1 MiB; put it in a file and submit the file's path"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the prompt on stdin is not UTF-8 (byte {error.start}); convert it first"
        ) from None
