"""A secret that others may read, a configuration that others may write: said by ``--check``, at
the start, after SIGHUP and by ``doctor``, and refused in production."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, wait_until
from runctl.config.access import access_problems
from runctl.config.load import load

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OTHER = 4321
KEY = "a-key-of-some-length"


def problems(path: Path, text: str, user: int | None = None) -> list[str]:
    """What is said of a configuration that holds ``text``; ``path`` becomes "@"."""
    file = path / "runctld.toml"
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    file.write_text(f'state_dir = "{path}/state"\n{text}')
    file.chmod(mode)
    found = access_problems(load(file), user)
    return [f"{key}: {said}; {fix}".replace(str(path), "@") for key, said, fix in found]


def named(path: Path, mode: int, name: str = "key", text: str = KEY) -> Path:
    file = path / name
    file.write_text(text)
    file.chmod(mode)
    return file


def chat(more: str) -> str:
    return f'[runners.c]\nkind = "chat"\nbase_url = "http://127.0.0.1:1"\nmodel = "m"\n{more}\n'


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666])
def test_a_secret_that_others_may_read(tmp_path: Path, mode: int) -> None:
    file = named(tmp_path, mode)
    text = chat(f'api_key_file = "{file}"')
    said = f"@/key holds a secret, and others may read it (mode {mode:04o}); chmod 600 @/key"
    assert problems(tmp_path, text) == [f"runners.c.api_key_file: {said}"]
    file.chmod(0o600)
    assert problems(tmp_path, text) == []


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ('[nats]\nurl = "tls://127.0.0.1:1"\ncredentials = "@"', "nats.credentials"),
        ('[nats]\nurl = "tls://127.0.0.1:1"\nnkey = "@"', "nats.nkey"),
        (
            '[nats]\nurl = "tls://127.0.0.1:1"\ntls_cert = "/dev/null"\ntls_key = "@"',
            "nats.tls_key",
        ),
        ('[nats]\ncontext = "@"', "nats.context"),
        ('[metrics]\ntoken_file = "@"', "metrics.token_file"),
        ('executor_id = "x"\n[database]\nurl_file = "@"\n[nats]\nurl = "nats://x"', "url_file"),
        (
            'executor_id = "x"\n[database]\nurl = "postgresql://u@h/d?sslmode=verify-full&sslkey=@"'
            '\n[nats]\nurl = "nats://x"',
            "sslkey in database.url",
        ),
    ],
    ids=lambda text: text if " = " not in text else "",
)
def test_every_file_with_a_secret(tmp_path: Path, section: str, text: str) -> None:
    content = "postgresql://u:p@127.0.0.1/d"
    if "context" in section:
        content = '{"url": "tls://127.0.0.1:1", "user": "u", "password": "a-long-password"}'
    file = named(tmp_path, 0o644, "key.json" if "context" in section else "key", content)
    (said,) = problems(tmp_path, section.replace("@", str(file)))
    assert text in said
    assert "others may read it" in said
    assert said.endswith(f"chmod 600 @/{file.name}")


def test_a_configuration_that_holds_a_secret_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    config = tmp_path / "runctld.toml"
    config.touch()
    config.chmod(0o644)
    assert problems(tmp_path, chat('api_key = "${SOME_KEY}"')) == []
    (said,) = problems(tmp_path, chat(f'api_key = "{KEY}"'))
    assert said.startswith("configuration: @/runctld.toml holds a secret, and others may read")


@pytest.mark.parametrize("mode", [0o622, 0o602])
def test_a_configuration_that_others_may_write(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "runctld.toml"
    file.touch()
    file.chmod(mode)
    said = f"configuration: @/runctld.toml may be written by others (mode {mode:04o})"
    assert problems(tmp_path, "") == [f"{said}; chmod go-w @/runctld.toml"]


@root
def test_a_group_with_others_in_it(tmp_path: Path) -> None:
    file = tmp_path / "runctld.toml"
    file.touch()
    os.chown(file, 0, OTHER)
    file.chmod(0o660)
    (said,) = problems(tmp_path, "")
    assert "may be written by others (mode 0660)" in said
    # root's, for the daemon's group to read: as it is installed.
    file.chmod(0o640)
    os.chown(file, 0, OTHER)
    assert problems(tmp_path, chat(f'api_key = "{KEY}"')) == []


@root
def test_what_belongs_to_another_user(tmp_path: Path) -> None:
    file = named(tmp_path, 0o600)
    os.chown(file, OTHER, OTHER)
    text = chat(f'api_key_file = "{file}"')
    (said,) = problems(tmp_path, text)
    assert said.startswith(f"runners.c.api_key_file: @/key belongs to user id {OTHER}")
    assert problems(tmp_path, text, OTHER) == []
    file.chmod(0o640)  # as libpq: a user's own is for nobody else
    (said,) = problems(tmp_path, text, OTHER)
    assert said.endswith("chmod 600 @/key")


def test_directories_above(tmp_path: Path) -> None:
    """Whoever may write one of them puts another file there; also where a link leads."""
    way = tmp_path / "open" / "in"
    way.mkdir(parents=True)
    file = named(way, 0o600)
    link = tmp_path / "link"
    link.symlink_to(file)
    for named_as in (file, link):
        text = chat(f'api_key_file = "{named_as}"')
        assert problems(tmp_path, text) == []
        (tmp_path / "open").chmod(0o777)
        (said,) = problems(tmp_path, text)
        assert "may be written by others (mode 0777); chmod go-w @/open" in said
        (tmp_path / "open").chmod(0o1777)  # as /tmp: there nobody replaces another's
        assert problems(tmp_path, text) == []
        (tmp_path / "open").chmod(0o755)


def test_a_device_is_not_looked_at_and_a_pipe_is(tmp_path: Path) -> None:
    assert problems(tmp_path, chat('api_key_file = "/dev/null"')) == []
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    text = chat(f'api_key_file = "{pipe}"')
    assert problems(tmp_path, text) == []
    pipe.chmod(0o622)
    (said,) = problems(tmp_path, text)
    assert "@/pipe may be written by others (mode 0622)" in said


@root
@pytest.mark.parametrize("way", ["sticky/key", "sticky/folder/key", "own"])
def test_links_of_others_on_the_way(tmp_path: Path, way: str) -> None:
    """Who made a link may have it lead elsewhere, and so may who may write where it is."""
    named(tmp_path, 0o600)
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    links = {"sticky/key": tmp_path / "key", "sticky/folder": tmp_path}
    if way == "own":  # leads to a link in a directory of another's
        links["own"] = tmp_path / "sticky/theirs/key"
        (tmp_path / "sticky/theirs").mkdir()
        (tmp_path / "sticky/theirs/key").symlink_to(tmp_path / "key")
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    text = chat(f'api_key_file = "{tmp_path / way}"')
    assert problems(tmp_path, text) == []
    other = {"sticky/folder/key": "sticky/folder", "own": "sticky/theirs"}.get(way, way)
    os.chown(tmp_path / other, OTHER, OTHER, follow_symlinks=False)
    (said,) = problems(tmp_path, text)
    assert f"@/{other}, " in said
    assert f" belongs to user id {OTHER}; put " in said


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslcrl"])
def test_whom_postgresql_is_taken_for(tmp_path: Path, name: str) -> None:
    file = named(tmp_path, 0o646)
    text = f'executor_id = "x"\n[database]\nurl = "postgresql://u@localhost/d?{name}={file}"\n'
    (said,) = problems(tmp_path, text)
    assert said.startswith(f"{name} in database.url: @/key may be written by others")


def test_the_last_of_two_files_counts(tmp_path: Path) -> None:
    """For libpq, and so for us."""
    closed, opened = named(tmp_path, 0o600, "closed"), named(tmp_path, 0o644, "open")
    url = f"postgresql://u@localhost/d?passfile={closed}&passfile={opened}"
    (said,) = problems(tmp_path, f'executor_id = "x"\n[database]\nurl = "{url}"\n')
    assert said.startswith("passfile in database.url: @/open holds a secret")


def check(box: Box) -> Any:
    command = [sys.executable, "-m", "runctl.supervisor.main", "-c", str(box.config), "--check"]
    return subprocess.run(command, capture_output=True, text=True)


def test_each_says_it_and_production_refuses(stopped_box: Box) -> None:
    box, file = stopped_box, named(stopped_box.path, 0o644)
    box.configure(chat(f'api_key_file = "{file}"'))
    line = (
        f"runners.c.api_key_file: {file} holds a secret, and others may read it (mode 0644);"
        f" chmod 600 {file}"
    )
    done = check(box)
    assert done.returncode == 0
    assert f"runctld: warning: {line}" in done.stderr.splitlines()
    box.start()
    assert f"WARNING runctld.reload: {line}" in box.log.read_text()
    (found,) = (x for x in box.json("doctor")["findings"] if x["check"] == "access")
    assert (found["state"], found["fix"]) == ("warn", f"chmod 600 {file}")
    os.kill(box.pid, signal.SIGHUP)
    wait_until(lambda: box.log.read_text().count(f"WARNING runctld.reload: {line}") == 2, "said")

    named_so = 'executor_id = "x"\nenvironment = "production"\n'
    box.config.write_text(named_so + box.config.read_text())
    os.kill(box.pid, signal.SIGHUP)
    wait_until(lambda: f"SIGHUP: nothing is changed: {line}" in box.log.read_text(), "refused")
    box.term()
    assert box.start(ready=False).wait(DEADLINE) == 78
    assert box.log.read_text().splitlines()[-1] == f"runctld: {line}"
    assert check(box).returncode == 78
    file.chmod(0o600)
    assert check(box).returncode == 0
