"""The page: what is served, its logic, and a browser that goes on while everything is killed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from browsers import PROGRAM, Browser
from conftest import Box, wait_until
from gateways import Gateway

ROOT = Path(__file__).parents[1]
NODE = shutil.which("node")
browser_only = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt install chromium")
OUTPUT = """import sys, time, pathlib
print('\\x1b[31mred <b>bold</b>\\x1b[0m plain', flush=True)
print('beside', file=sys.stderr, flush=True)
n = 0
while not pathlib.Path('enough').exists():
    n += 1; print('line', n, '.', flush=True); time.sleep(0.1)
"""


@pytest.fixture
def box(stopped_box: Box) -> Box:
    stopped_box.configure("[queue]\noutlive = '20s'\n")
    stopped_box.start()
    return stopped_box


@pytest.fixture
def gateway(box: Box) -> Iterator[Gateway]:
    made = Gateway(box.config)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.short
@pytest.mark.skipif(NODE is None, reason="no Node: install node 20 or newer")
def test_its_logic() -> None:
    assert NODE is not None
    done = subprocess.run(
        [NODE, "--test", str(ROOT / "tests/page.test.mjs")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# pass 5" in done.stdout


@pytest.mark.short
def test_nothing_is_taken_for_html() -> None:
    """Nor loaded from elsewhere, nor written into the page as a script or a style."""
    page = ROOT / "gateway/page"
    scripts = "".join(file.read_text() for file in page.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", scripts)
    text = (page / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style| on[a-z]+=| style=|//[a-z]", text)
    assert len(re.findall(r"[^:]//[a-z]", (page / "style.css").read_text())) == 0


def test_files_have_their_types_and_the_policy(stopped_box: Box) -> None:
    path = stopped_box.path / "tokens.toml"
    path.write_text(f'[a]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\nscopes = ["read"]\n')
    path.chmod(0o600)
    stopped_box.configure(f'[gateway]\ntokens_file = "{path}"\n')
    gateway = Gateway(stopped_box.config)
    try:
        assert gateway.get("/v1/changes").status_code == 401
        files = [x for x in (ROOT / "gateway/page").iterdir() if x.name != "index.html"]
        for name in ("/", *(f"/page/{x.name}" for x in files)):
            answer = gateway.get(name)
            kind = {"": "html", "js": "javascript", "css": "css", "svg": "svg+xml"}
            assert answer.status_code == 200
            assert kind[name.rpartition(".")[2].strip("/")] in answer.headers["content-type"]
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            head = gateway.client.head(name)
            assert (head.status_code, head.content) == (200, b"")
            assert gateway.post(name).status_code == 405
        assert gateway.get("/", headers={"host": "evil.example"}).status_code == 421
    finally:
        gateway.close()


def test_changes_are_told_live(box: Box, gateway: Gateway) -> None:
    with gateway.client.stream("GET", "/v1/changes") as answer:
        frames = (json.loads(x[6:]) for x in answer.iter_lines() if x.startswith("data: "))
        assert next(frames) == {"threads": None}

        def wait_told(thread: str) -> None:
            path = f"/v1/threads/{quote(thread, safe='')}/runs"
            while True:
                assert gateway.post(path, {"argv": ["true"]}).status_code == 201
                for frame in frames:
                    if frame["threads"] is None:
                        break  # any may have changed: what was just submitted, too
                    if thread in frame["threads"]:
                        return

        wait_told("one")
        wait_told("two/é")
        box.kill()
        box.start()
        wait_told("three")


@browser_only
@pytest.mark.long
def test_a_browser_goes_on_while_everything_is_killed(
    box: Box, gateway: Gateway, browser: Browser
) -> None:
    browser.open(f"{gateway.url}/")
    browser.wait_for("document.querySelector('#state')?.textContent === 'Live.'", "it is live")
    browser.evaluate("window.stays = true")
    run = box.submit_py("talk/é", OUTPUT)
    row = "[...document.querySelectorAll('tbody tr')].find(x => x.textContent.includes('talk/é'))"
    browser.wait_for(f"{row}?.textContent.includes('running')", "the board shows it")
    browser.evaluate(f"{row}.querySelector('a').focus()")
    browser.press("Enter")
    browser.wait_for(
        "document.querySelector('.run[open] .output')?.textContent.includes('line 3 .')",
        "its output comes",
    )
    assert browser.evaluate("document.activeElement.id") == "main"
    assert browser.evaluate("document.querySelector('.run .fg-1').textContent") == "red <b>bold</b>"
    assert browser.evaluate("document.querySelector('.output b')") is None
    assert "beside" in browser.evaluate("document.querySelector('.stderr').textContent")

    def lines() -> list[int]:
        text = browser.evaluate(
            "[...document.querySelectorAll('.run pre[aria-label=output]')]"
            ".map(x => x.textContent).join('')"
        )
        return [int(n) for n in re.findall(r"line (\d+) \.", text)]

    for victim in (gateway, box, gateway):
        seen = len(lines())
        victim.kill()
        if victim is gateway:
            browser.wait_for(
                "document.querySelector('#state').textContent.startsWith('Waiting')",
                "it says that it waits",
            )
        victim.start()
        wait_until(lambda seen=seen: len(lines()) > seen + 3, "it goes on")
        browser.wait_for("document.querySelector('#state').textContent === 'Live.'", "live again")
    (box.path / "enough").touch()
    browser.wait_for(
        "document.querySelector('.run').textContent.includes('The run has ended: succeeded')",
        "the end is said in words",
    )
    found = lines()
    assert found == [*range(1, len(found) + 1)]
    assert len(found) == len(
        [x for x in box.runctl("attach", "talk/é", "--run", run).splitlines() if "line" in x]
    )
    assert browser.evaluate("window.stays"), "the page was loaded again"
    assert browser.complaints == []


@browser_only
@pytest.mark.long
def test_a_token_is_asked_for_and_a_run_aborted(stopped_box: Box, browser: Browser) -> None:
    path = stopped_box.path / "tokens.toml"
    path.write_text(
        f'[a]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\nscopes = ["read", "operate"]\n'
    )
    path.chmod(0o600)
    stopped_box.configure(f'[gateway]\ntokens_file = "{path}"\n')
    stopped_box.start()
    gateway = Gateway(stopped_box.config)
    try:
        browser.open(f"{gateway.url}/#/thread/early")
        browser.wait_for("document.querySelector('#ask-token')?.open", "it asks for a token")
        for token in ("wrong", "secret"):
            browser.wait_for("document.activeElement.id === 'token'", "typing goes there")
            browser.type(token)
            browser.press("Enter")
            browser.wait_for("document.querySelector('#token').value === ''", "it is taken")
        browser.wait_for(
            "document.querySelector('main').textContent.includes('no run yet')", "early"
        )
        run = stopped_box.submit("early", "sh", "-c", "echo here; sleep 600")
        browser.wait_for(
            "document.querySelector('.output')?.textContent.includes('here')", "output"
        )
        browser.evaluate("document.querySelector('.run > .danger').click()")
        browser.wait_for("document.querySelector('#ask-abort').open", "it asks")
        browser.evaluate("document.querySelector('#ask-abort button[value=abort]').click()")
        browser.wait_for(
            "document.querySelector('.run').textContent.includes('ended: aborted')", "aborted"
        )
        assert stopped_box.ended(run)["status"] == "aborted"
        assert "secret" not in browser.evaluate("location.href")
        assert "secret" not in gateway.log.read_text()
        for width in (360, 1200):
            browser.resize(width, 740, dark=width == 360)
            wide = browser.evaluate("document.documentElement.scrollWidth")
            assert wide <= width
        assert browser.complaints == []
    finally:
        gateway.close()
