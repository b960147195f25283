"""What runctl doctor finds, with the daemon up and down."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Box, running_box, wait_until
from jsonschema import Draft202012Validator
from pgserver import Postgres, free_port
from runctl.cli.health import local_checks, process_limits, remote_checks, systemd_unit
from runctl.config.load import load
from runctl.protocol.endpoint import ENDPOINT_FILE
from runctl.protocol.stream_config import wanted

SCHEMA = json.loads(
    (Path(__file__).parent.parent / "docs" / "schema" / "doctor.schema.json").read_text()
)


def looked(box: Box, code: int = 0) -> dict[str, tuple[str, str, str | None]]:
    """(state, said, fix) by check; of several with one name the worst."""
    answer = json.loads(box.runctl("doctor", "--json", code=code))
    Draft202012Validator(SCHEMA).validate(answer)
    assert answer["ok"] is (code == 0)
    found: dict[str, tuple[str, str, str | None]] = {}
    for x in sorted(answer["findings"], key=lambda x: ["ok", "warn", "fail"].index(x["state"])):
        found[x["check"]] = (x["state"], x["said"], x["fix"])
        assert (x["fix"] is None) == (x["state"] == "ok")
    return found


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(tmp_path_factory.mktemp("well"), "[stream]\nmax_bytes = '64MiB'\n") as box:
        yield box


def test_a_daemon_that_is_well(well: Box) -> None:
    found = looked(well)
    for check in ("config", "versions", "nats-server", "state_dir", "daemon", "nats", "stream"):
        assert found[check][0] == "ok", found
    assert found["database"][0] == "ok"
    assert found["clock of nats"][0] == "ok"
    assert well.daemon is not None
    assert f"pid {well.daemon.pid}" in found["daemon"][1]
    assert "of runctld" in found["open files"][1]
    assert "nats port" not in found
    lines = well.runctl("doctor").splitlines()
    assert all(line.startswith(("ok ", "WARN ", "FAIL ", "     ")) for line in lines)


def test_a_state_directory_that_is_open(well: Box) -> None:
    well.state.chmod(0o755)
    try:
        state, _, fix = looked(well)["state_dir"]
        assert (state, fix) == ("warn", f"chmod 700 {well.state}")
        well.state.chmod(0o777)
        assert looked(well, 1)["state_dir"][0] == "fail"
        assert "FAIL  state_dir" in well.runctl("doctor", code=1)
    finally:
        well.state.chmod(0o700)


def test_a_daemon_that_hangs(well: Box) -> None:
    assert well.daemon is not None
    os.kill(well.daemon.pid, signal.SIGSTOP)
    try:
        state, said, _ = looked(well, 1)["daemon"]
    finally:
        os.kill(well.daemon.pid, signal.SIGCONT)
    assert state == "fail"
    assert f"pid {well.daemon.pid} holds the lock" in said

    def answers() -> bool:
        findings = json.loads(well.runctl("doctor", "--json", code=None))["findings"]
        return [x["state"] for x in findings if x["check"] == "daemon"] == ["ok"]

    wait_until(answers, "it answers again")


def test_a_daemon_that_is_down(stopped_box: Box) -> None:
    found = looked(stopped_box)
    assert found["daemon"][0] == "warn"
    assert found["daemon"][1] == "neither runctld nor its nats-server is running"
    assert found["daemon"][2] == f"start it: runctld --config {stopped_box.config}"
    assert "made by the first start" in found["state_dir"][1]
    stopped_box.state.mkdir(mode=0o700)
    (stopped_box.state / "runctl.sqlite").write_bytes(b"no database at all" * 100)
    (stopped_box.state / "runctl.sqlite").chmod(0o644)
    found = looked(stopped_box, 1)
    assert found["database"][0] == "fail"
    assert found["state_dir"][0] == "warn"


def test_a_taken_port_and_a_missing_tool(stopped_box: Box) -> None:
    with socket.socket() as taken:
        port = free_port()  # which nobody is given when it is free again
        taken.bind(("127.0.0.1", port))
        taken.listen()
        stopped_box.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
        assert looked(stopped_box, 1)["metrics port"][0] == "fail"
    assert looked(stopped_box)["metrics port"][0] == "ok"


def test_configurations(stopped_box: Box) -> None:
    stopped_box.configure("[queue]\nmax_runing = 3\n")
    state, said, fix = looked(stopped_box, 1)["config"]
    assert state == "fail"
    assert "max_runing" in said + str(fix)
    stopped_box.configure(
        '[runners.x]\nkind = "chat"\nbase_url = "http://x"\nmodel = "${NO_SUCH}"\n'
    )
    found = looked(stopped_box)
    assert found["config"][0] == "warn"
    assert "NO_SUCH" in found["config"][1]
    assert found["database"][0] == "ok"  # the rest is looked at


def test_limits_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runctld.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/state"\n[queue]\nmax_running = 900000\n'
        '[stream]\nmax_bytes = "4000TiB"\n'
    )
    config = load(file)
    assert local_checks.check_disk(config).state == "warn"
    assert next(x.state for x in process_limits.check_limits(config, None)) == "warn"
    monkeypatch.setattr(local_checks, "LEAST_FREE", 2**62)
    assert local_checks.check_disk(config).state == "fail"
    assert process_limits.check_cgroups(None).state in ("ok", "warn")


def test_a_nats_server_that_others_may_write_is_not_asked(stopped_box: Box) -> None:
    """It would be root's, when root looks."""
    ran, program = stopped_box.path / "ran", stopped_box.path / "nats-server"
    program.write_text(f"#!/bin/sh\ntouch {ran}\necho nats-server: v2.15.1\n")
    program.chmod(0o777)
    stopped_box.configure(f'[nats]\nserver = "{program}"\n')
    state, said, _ = looked(stopped_box, 1)["nats-server"]
    assert (state, ran.exists()) == ("fail", False)
    assert f"{program} may be written by others (mode 0777); it was not asked what it is" in said
    program.chmod(0o755)
    assert looked(stopped_box)["nats-server"][0] == "ok"
    assert ran.exists()


@pytest.mark.nightly
def test_what_does_not_belong_into_a_state_directory(stopped_box: Box) -> None:
    """And what would be waited for there."""
    (stopped_box.state / "nats").mkdir(parents=True)
    stopped_box.state.chmod(0o700)
    pipes = [ENDPOINT_FILE, "lock", "keeper.lock", "executor-id", "runctl.sqlite"]
    for name in pipes:
        os.mkfifo(stopped_box.state / name, 0o600)
    state, said, _ = looked(stopped_box, 1)["database"]
    assert (state, said) == ("fail", f"{stopped_box.state}/runctl.sqlite is no file")
    stopped_box.runctl("list", code=4)
    for name in pipes:
        (stopped_box.state / name).unlink()
    (stopped_box.state / "nats/store").symlink_to("/dev/zero")
    state, said, _ = looked(stopped_box, 1)["state_dir"]
    assert (state, said) == (
        "fail",
        f"{stopped_box.state}/nats/store is a link, and none is followed there",
    )


def test_a_key_file_that_is_missing(tmp_path: Path) -> None:
    key = tmp_path / "key"
    text = '[runners.chat]\nkind = "chat"\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "m"\n'
    file = tmp_path / "runctld.toml"
    file.write_text(f'{text}api_key_file = "{key}"\n')
    (found,) = local_checks.check_key_files(load(file))
    assert (found.check, found.state) == ("runner chat", "warn")
    assert found.said.startswith(f"api_key_file {key} does not exist")
    key.write_text("k")
    assert not list(local_checks.check_key_files(load(file)))


def test_metrics_for_everybody(tmp_path: Path) -> None:
    file, token = tmp_path / "runctld.toml", tmp_path / "token"
    token.write_text("a-token-of-some-length")
    for more, count in (
        ('listen = "127.0.0.1:9"', 0),
        ('listen = "0.0.0.0:9"\nallow_remote = true', 1),
        ('listen = "[::]:9"\nallow_remote = true', 1),
        (f'listen = "0.0.0.0:9"\nallow_remote = true\ntoken_file = "{token}"', 0),
    ):
        file.write_text(f"[metrics]\n{more}\n")
        assert [x.state for x in local_checks.check_metrics(load(file))] == ["warn"] * count, more


def test_clocks() -> None:
    now = time.time()
    assert remote_checks._clock("c", now, now, now).state == "ok"
    assert remote_checks._clock("c", now - 10, now, now).state == "warn"
    assert remote_checks._clock("c", now + 100, now, now).state == "fail"
    assert remote_checks._unix("2026-11-25T00:00:00.123456789Z") == pytest.approx(1795564800.123456)


def test_a_stream_of_others(well: Box) -> None:
    config = load(well.config)
    good = wanted(config).as_dict()
    for edit, state in (
        ({}, "ok"),
        ({"discard": "old"}, "fail"),
        ({"allow_rollup_hdrs": False}, "fail"),
        ({"sealed": True}, "fail"),
        ({"storage": "memory"}, "fail"),
        ({"max_bytes": -1}, "warn"),
        ({"max_age": 10**9}, "warn"),
        ({"num_replicas": 3}, "warn"),
    ):
        (found,) = remote_checks._stream(config, good | edit, 1)
        assert found.state == state, found
        assert bool(edit) == bool(found.fix)
        # Whoever is told to remove the stream is told what goes with it.
        assert "remove" not in (found.fix or "") or "all stored output with it" in (found.fix or "")


def test_postgresql(tmp_path: Path, postgres: Postgres, nats_server: str) -> None:
    box = Box(tmp_path)
    url = postgres.database()
    text = f'executor_id = "doc"\n[database]\nurl = "{{}}"\n[nats]\nurl = "{nats_server}"\n'
    try:
        box.configure(text.format(url))
        found = looked(box)
        assert found["lease"] == ("ok", "free", None)
        assert found["database"][1].endswith(", still empty")
        assert found["clock of postgresql"][0] == "ok"
        box.start()
        found = looked(box)
        assert found["daemon"][0] == "ok"
        assert "held by" in found["lease"][1]
        assert box.daemon is not None
        os.kill(box.daemon.pid, signal.SIGSTOP)
        try:
            found = looked(box, 1)
        finally:
            os.kill(box.daemon.pid, signal.SIGCONT)
        assert found["lease"][0] == "warn"
        secret = url.replace("://", "://nobody:canary-secret@", 1) if "@" not in url else url
        box.configure(text.format(url.rpartition("/")[0] + "/no_such_database"))
        found = looked(box, 1)
        assert found["database"][0] == "fail"
        assert "canary" not in str(found), secret
    finally:
        box.close()


def test_a_database_file_without_wal(tmp_path: Path) -> None:
    file = tmp_path / "runctld.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n')
    with sqlite3.connect(tmp_path / "runctl.sqlite") as database:
        database.execute("CREATE TABLE workflow_status (name TEXT)")
    database.close()
    finding: Any = remote_checks.sqlite(load(file))
    assert finding.state == "warn"


@pytest.mark.nightly
def test_an_environment_that_stops_every_chat(
    stopped_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this shell, and of a daemon that runs, whose environment is another one."""
    box = stopped_box
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    assert "chats" not in looked(box)
    box.configure('[runners.c]\nkind = "chat"\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "m"\n')
    assert looked(box)["chats"][0] == "ok"
    monkeypatch.setenv("NO_PROXY", "[::1]")
    state, said, fix = looked(box, 1)["chats"]
    assert (state, fix) == ("fail", "write ::1 there")
    assert said.startswith("NO_PROXY holds '[::1]', which cannot be read (of this shell")
    box.start(cold=True)
    monkeypatch.delenv("NO_PROXY")
    assert looked(box, 1)["chats"][1].endswith("cannot be read (of runctld)")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("0::/system.slice/runctld.service/service\n", ("runctld.service", "--system")),
        (
            "4:memory:/x.service\n1:name=systemd:/system.slice/a@b.service\n",
            ("a@b.service", "--system"),
        ),
        (
            "0::/user.slice/user-7.slice/user@7.service/app.slice/r.service\n",
            ("r.service", "--user"),
        ),
        ("0::/user.slice/user-7.slice/session-1.scope\n", None),
        ("0::/\n", None),
    ],
)
def test_the_unit_of_a_process(groups: str, expected: tuple[str, str] | None) -> None:
    assert systemd_unit.find_unit(groups) == expected


def test_what_a_unit_takes_from_commands() -> None:
    ours = Path(__file__).parent.parent / "systemd"
    for unit in ("runctld.service", "runctld@.service", "user.service"):
        lines = (ours / unit).read_text().splitlines()
        has = dict(line.partition("=")[::2] for line in lines if "=" in line)
        assert list(systemd_unit.judge_unit(has)) == []
        for name, value in (
            ("KillMode", "mixed"),
            ("Restart", "no"),
            ("NotifyAccess", "none"),
            ("FileDescriptorStoreMax", "0"),
            ("ExecStop", ""),
            ("PrivateTmp", "yes"),
            ("RemoveIPC", "yes"),
        ):
            assert len(list(systemd_unit.judge_unit({**has, name: value}))) == 1, name
