"""``runctl demo``: what it claims it has checked; here, that its page is real and nothing stays."""

from __future__ import annotations

import os
import re

import httpx
import pytest
from conftest import Box, wait_until
from proc import read_proc
from terminal import Terminal

URL = re.compile(rb"http://127\.0\.0\.1:\d+/")
FOLDER = re.compile(rb"/runctl-demo-\w+")


@pytest.mark.long
def test_a_page_stays_through_the_kill_until_enter(stopped_box: Box) -> None:
    terminal = Terminal(stopped_box, "demo", columns=160, rows=100)
    address = wait_until(lambda: URL.search(terminal.raw), "the page's address is said")
    url = address[0].decode()
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert "<title>" in client.get("/").text
        wait_until(lambda: b"press Enter" in terminal.raw, "it is over")
        listed = client.get("/v1/threads").json()
        assert {x["thread"] for x in listed} == {"build", "ask"}
    terminal.send("\n")
    assert terminal.wait() == 0
    assert "20/20 exactly once" in terminal.raw.decode()
    folder = FOLDER.search(terminal.raw)
    assert folder is not None
    names = [name for name in os.listdir("/proc") if name.isdigit()]
    assert not [name for name in names if folder[0] in read_proc(int(name), "cmdline")]
