"""The chat runner against answers as endpoints send them, byte for byte, in ``wire/``, and what
the ``openai`` package makes of the same bytes (``wire_readings.py``)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import DEADLINE
from runctl.config.schema import ChatRunner
from runctl.protocol.errors import RunFailed
from runctl.protocol.model import RunSpec, Status
from runctl.supervisor.execution.runners.chat import Chat
from wire_readings import FOLDER, playing

SPEC = RunSpec(run="r1", thread="t", runner="chat", prompt="hello")
ANSWERS = sorted(FOLDER.glob("*.http"))


def pieces(file: Path) -> list[bytes]:
    """The answer, cut at random places, alike in each run of the tests."""
    data, chance = file.read_bytes(), random.Random(file.name)
    cuts = sorted(chance.sample(range(1, len(data)), min(len(data) - 1, chance.randint(1, 60))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


async def read(*answer: bytes) -> dict[str, Any]:
    """Our reading: the text, and the note of a success or the error of a failure."""
    seen: list[bytes] = []

    async def emit(stream: str, data: bytes) -> None:
        assert stream == "text"
        seen.append(data)
        await trio.lowlevel.checkpoint()

    with playing(*answer) as port, trio.fail_after(2 * DEADLINE):
        url = f"http://127.0.0.1:{port}/v1"
        runner = ChatRunner("chat", base_url=url, model="m", timeout=DEADLINE, retry=0.0)
        try:
            outcome = await Chat(runner).run(SPEC, 1, emit, ())
        except RunFailed as error:
            said = str(error)
            assert said.startswith(f"{url}/chat/completions: ")
            return {"error": said, "text": b"".join(seen).decode()}
    assert outcome.status is Status.SUCCEEDED
    assert outcome.reply == b"".join(seen).decode()
    return {"note": outcome.note, "text": outcome.reply}


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("file", ANSWERS, ids=[file.stem for file in ANSWERS])
async def test_an_answer_is_read_as_by_the_reference_or_otherwise_on_purpose(
    file: Path, cut: bool
) -> None:
    expected = json.loads(file.with_suffix(".json").read_text())
    ours, reference = expected["ours"], expected["reference"]
    found = await read(*(pieces(file) if cut else [file.read_bytes()]))
    assert found["text"] == ours.get("text", "")
    if "error" in ours:
        assert ours["error"] in found.get("error", "")
    else:
        assert found == {"text": ours["text"], "note": ours.get("note")}
    same = ("error" in found) == (reference["error"] is not None)
    same = same and ("error" in found or found["text"] == reference["text"])
    assert same != bool(expected.get("differs")), expected


def test_each_answer_has_a_reading_and_each_reading_an_answer() -> None:
    assert {f.stem for f in ANSWERS} == {f.stem for f in FOLDER.glob("*.json")}
    assert len(ANSWERS) > 100
