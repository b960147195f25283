"""Aborts that come at once, and one that hangs: each is answered for itself."""

from __future__ import annotations

import os
import signal
import sys

from conftest import DEADLINE, Box, wait_until
from proc import alive
from runctl.protocol import messages

#: Says that it hears TERM, and goes on.
DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
print("up", os.getpid(), flush=True)
while True:
    time.sleep(60)
"""


def test_aborts_wait_each_for_itself(stopped_box: Box) -> None:
    """Four of them take one grace; another one is answered while they wait; and so is what
    somebody asks for who does not want to hear it."""
    box = stopped_box
    box.configure('[queue]\nstop_grace = "1h"\n')
    box.start()
    threads = ("a", "b", "c", "d")
    for thread in threads:
        box.submit(thread, sys.executable, "-c", DEAF)
    quick = box.submit("quick", "sleep", "600")

    def said(thread: str) -> list[str]:
        return box.runctl("attach", thread, "--no-follow", code=None).split()

    wait_until(lambda: all("up" in said(thread) for thread in threads), "they run")
    wait_until(lambda: box.show(quick)["status"] == "running", "it runs")
    aborts = [box.popen("abort", thread) for thread in threads]
    wait_until(lambda: all("term" in said(thread) for thread in threads), "all were told to end")
    assert box.runctl("abort", "quick") == f"aborted {quick}\n"
    assert all(abort.poll() is None for abort in aborts)
    for thread in threads:
        pid = int(said(thread)[1])
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)
    assert [abort.wait(DEADLINE) for abort in aborts] == [0] * 4


def test_submits_of_a_thread_keep_their_order_and_share_no_place(box: Box) -> None:
    """All of them are sent before the first one is answered."""
    import asyncio

    from runctl.client.link import dial
    from runctl.client.requests import ask
    from runctl.config.load import load

    async def main() -> list[tuple[str, str]]:
        link = await dial(load(box.config, client=True))
        try:
            await ask(
                link, messages.List(), messages.Threads
            )  # nats-py's first request is its slowest
            tasks = [
                ask(link, messages.Submit(f"t{n % 3}", argv=["true"]), messages.Submitted)
                for n in range(60)
            ]
            return [(reply.thread, reply.run) for reply in await asyncio.gather(*tasks)]
        finally:
            await link.close()

    found = asyncio.run(main())
    for n in range(3):
        thread = f"t{n}"
        sent = [run for name, run in found if name == thread]
        begun = [row["run"] for row in box.json("list", thread)]
        assert sorted(sent) == sent
        assert begun == sent[::-1]


def test_a_run_that_waits_for_its_replay_is_aborted(stopped_box: Box) -> None:
    """It was running when its daemon died: nobody has to know that it is queued for the moment."""
    box = stopped_box
    box.start()
    runs = {name: box.submit(name, "sleep", "600") for name in ("a", "b")}
    for run in runs.values():
        wait_until(lambda run=run: box.show(run)["status"] == "running", "it runs")
    box.kill()
    box.configure("[queue]\nmax_running = 1\n")
    box.start()
    first = wait_until(
        lambda: next((n for n, r in runs.items() if box.show(r)["status"] == "running"), ""),
        "one is replayed",
    )
    (other,) = runs.keys() - {first}
    assert box.show(runs[other])["status"] == "queued"
    assert box.runctl("abort", other).strip() == f"aborted {runs[other]}"
    assert box.show(runs[other])["status"] == "aborted"
    box.runctl("abort", first)
