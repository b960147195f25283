"""Files and processes are closed to other users from the first byte on, under any umask, and
other users' commands are refused in words."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import children
from runctl.protocol.errors import ConfigError
from runctl.supervisor.host.private_files import prepare_state_dir

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
NOBODY = 65534
PRINT_UMASK = "import os; print(oct(os.umask(0)))"


@pytest.fixture(scope="module")
def open_box() -> Iterator[Box]:
    """A daemon under umask 0. Everybody may read its configuration, as below /etc."""
    path = Path(tempfile.mkdtemp(prefix="runctl-permissions-"))
    path.chmod(0o755)
    box = Box(path)
    box.state = path / "a/b/state"
    box.prefix = ["sh", "-c", 'umask 0; exec "$@"', "sh"]
    box.configure('[runners.tty]\nkind = "command"\ntty = true\n')
    box.config.chmod(0o644)
    try:
        box.start()
        yield box
    finally:
        box.close()
        shutil.rmtree(path)


def umask_of(pid: int) -> str:
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "Umask" in x)
    return line.split()[1]


def everything(path: Path) -> Iterator[Path]:
    """It, and what is in it, but for directories that go meanwhile."""
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))


@linux
def test_nothing_is_open_to_others_under_umask_0(open_box: Box) -> None:
    box = open_box
    run = box.submit_py("t", PRINT_UMASK)
    box.runctl("wait", run)
    assert box.runctl("attach", "t", "--no-follow").strip() == "0o0", "a command keeps the user's"
    box.runctl("submit", "t", "--runner", "tty", "-a", "--", sys.executable, "-c", PRINT_UMASK)
    seen = set()
    for place in everything(box.path / "a"):
        try:
            found = place.lstat()
        except FileNotFoundError:  # nats-server, or SQLite, has just removed it
            continue
        wide = stat.S_IMODE(found.st_mode) & 0o077
        assert not wide, f"{place} is {stat.S_IMODE(found.st_mode):04o}"
        assert found.st_uid == os.getuid()
        seen.add(place.name)
    assert {"client.json", "server.conf", "server.log", "store", "lock", "keeper.lock"} <= seen
    assert {"executor-id", "runctl.sqlite", "runctl.sqlite-wal", "RUNCTL"} <= seen
    # That no file was wide for a moment: whoever makes them has a umask that forbids it.
    daemon = box.pid
    nats = children(daemon, "nats-server")
    assert len(nats) == 1
    for pid in (daemon, *nats):
        assert umask_of(pid) == "0077"


@linux
def test_the_daemon_leaves_no_core_and_cannot_be_looked_into() -> None:
    code = (
        "import ctypes; from runctl.protocol.hardening import close_process; close_process();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    assert subprocess.check_output([sys.executable, "-c", code]).strip() == b"0"


# ---- the state directory ------------------------------------------------------------------


@pytest.mark.short
def test_a_state_dir_that_others_may_read_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "state"
    place.mkdir()
    (place / "executor-id").write_text("a")
    place.chmod(0o755)
    prepare_state_dir(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [r.getMessage() for r in caplog.records] == [
        f"state_dir {place} was open to other users (mode 0755): it is 0700 now"
    ]
    caplog.clear()
    prepare_state_dir(place)
    assert not caplog.records


@pytest.mark.short
def test_a_state_dir_that_others_may_write_is_refused_unless_empty(tmp_path: Path) -> None:
    place = tmp_path / "state"
    place.mkdir()
    place.chmod(0o777)
    prepare_state_dir(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    place.chmod(0o777)
    (place / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match=r"may be written by other users \(mode 0777\)"):
        prepare_state_dir(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o777
    assert not (tmp_path / "target").exists()


@root
@pytest.mark.parametrize("name", ["lock", "runctl.sqlite", "executor-id", "nats/server.log", "new"])
def test_links_and_files_of_others_in_a_state_dir(tmp_path: Path, name: str) -> None:
    place, target = tmp_path / "state", tmp_path / "target"
    (place / "nats").mkdir(parents=True)
    place.chmod(0o700)
    target.write_text("mine")
    file = place / name
    file.symlink_to(target)
    with pytest.raises(ConfigError, match="is a link, and none is followed there; remove it"):
        prepare_state_dir(place)
    file.unlink()
    file.touch()
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"{name} belongs to user id {NOBODY}, runctld runs as"):
        prepare_state_dir(place)
    file.unlink()
    prepare_state_dir(place)
    (place / "nats").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (place / "nats").symlink_to(tmp_path / "elsewhere")  # a bigger disk, say
    prepare_state_dir(place)
    assert target.read_text() == "mine"


@pytest.mark.short
def test_a_state_dir_is_closed_while_it_is_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    listdir = os.listdir

    def look(path: int) -> list[str]:
        seen.append(stat.S_IMODE(os.fstat(path).st_mode))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", look)
    place = tmp_path / "state"
    place.mkdir()
    place.chmod(0o777)
    prepare_state_dir(place)
    assert seen == [0o700]


@root
def test_a_state_dir_of_another_user_is_refused(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    ours = tmp_path / "ours"
    ours.mkdir()
    box.state.symlink_to(ours)
    os.chown(box.state, NOBODY, NOBODY, follow_symlinks=False)
    assert box.start(ready=False).wait(DEADLINE) == 78
    assert f"state_dir {box.state} is a link that user id {NOBODY} made;" in box.log.read_text()
    assert list(ours.iterdir()) == []
    box.state.unlink()
    box.state.mkdir()
    os.chown(box.state, NOBODY, NOBODY)
    assert box.start(ready=False).wait(DEADLINE) == 78
    assert f"belongs to user id {NOBODY}, runctld runs as 0;" in box.log.read_text()
    assert list(box.state.iterdir()) == []


# ---- another user -------------------------------------------------------------------------

#: Imports all first: that user may be unable to read the interpreter's own directory.
OTHER_USER = """
import importlib, json, os, pkgutil, sys
import nats, nats.micro, nats.js, ssl, encodings.idna, encodings.utf_8_sig
import runctl.cli, runctl.client, runctl.config, runctl.protocol, runctl.supervisor
for package in (runctl.config, runctl.protocol, runctl.client, runctl.supervisor, runctl.cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(".keeper"):
            importlib.import_module(module.name)
for name in ("rich.console", "rich.table", "rich.text", "rich.live"):
    importlib.import_module(name)
from runctl.cli.main import main as runctl
from runctl.supervisor.lifecycle.arguments import runctld
user, config, home = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
os.environ["HOME"] = home
os.chdir("/")
answers = []
for words in json.load(sys.stdin):
    ends = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        for fd, (_, write) in zip((1, 2), ends):
            os.dup2(write, fd)
        for pair in ends:
            for fd in pair:
                os.close(fd)
        env, program = words.pop(0), words.pop(0)
        os.environ.update(env)
        sys.argv = [program, *words]
        try:
            (runctld if program == "runctld" else runctl)([*words], prog_name=program)
        except SystemExit as error:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(error.code if isinstance(error.code, int) else 0)
        finally:
            os._exit(99)
    texts = []
    for read, write in ends:
        os.close(write)
    for read, _ in ends:
        texts.append(open(read, errors="replace").read())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answers.append([code, *texts])
print(json.dumps(answers))
"""


def as_nobody(config: Path, commands: list[list[object]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_USER, str(NOBODY), str(config), str(config.parent)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


VERBS = (
    ["submit", "t", "--", "true"],
    ["list"],
    ["list", "t", "--json"],
    ["attach", "t"],
    ["attach", "t", "--no-follow"],
    ["abort", "t"],
    ["wait", "r"],
    ["show", "r"],
    ["retry", "r"],
    ["purge", "t", "--yes"],
    ["status"],
    ["status", "--json"],
)


@root
def test_another_users_runctl_is_refused(open_box: Box) -> None:
    box = open_box
    run = box.submit("t", "true")
    wait_until(lambda: box.show(run)["status"] == "succeeded", "its end is recorded")
    before = box.json("list", "t")
    commands: list[list[object]] = [[{}, "runctl", "-c", str(box.config), *verb] for verb in VERBS]
    for verb, (code, out, err) in zip(VERBS, as_nobody(box.config, commands), strict=True):
        assert code == 4, (verb, code, out, err)
        assert out == "", verb
        assert err == (
            f"runctl: {box.state}/nats/client.json may not be read by this user;"
            " run runctl as the user that runs runctld\n"
        ), verb
    assert box.json("list", "t") == before


@root
def test_another_users_doctor_says_what_it_may_not_see(open_box: Box) -> None:
    command: list[object] = [{}, "runctl", "-c", str(open_box.config), "doctor"]
    ((code, out, err),) = as_nobody(open_box.config, [command])
    assert (code, err) == (1, "")
    assert "\nFAIL  database" in out
    assert f"{open_box.state}/runctl.sqlite: Permission denied" in out


@root
def test_another_users_completion_is_silent_and_its_daemon_is_refused(open_box: Box) -> None:
    box = open_box
    completing = {
        "_RUNCTL_COMPLETE": "bash_complete",
        "RUNCTL_CONFIG": str(box.config),
    }
    box.runctl("wait", box.submit("t", "true"))
    completed, daemon = as_nobody(
        box.config,
        [[completing, "runctl", "runctl attach "], [{}, "runctld", "-c", str(box.config)]],
    )
    assert (completed[1].strip(), completed[2]) == ("", "")
    code, out, err = daemon
    assert (code, out) == (78, "")
    assert err.startswith(f"runctld: state_dir {box.state}: Permission denied;")
    assert err.count("\n") == 1
    assert box.json("status")["pid"] == box.pid


@root
def test_a_configuration_of_another_user_is_refused(open_box: Box) -> None:
    hidden = open_box.path / "hidden"
    hidden.mkdir(mode=0o700)
    config = hidden / "runctld.toml"
    verbs = ["list"], ["attach", "t"]
    for code, out, err in as_nobody(
        open_box.config, [[{}, "runctl", "-c", str(config), *verb] for verb in verbs]
    ):
        assert (code, out) == (4, "")
        assert err == (
            f"runctl: {config}: cannot be read: Permission denied:"
            " be the user that runs runctld, or name another file with --config\n"
        )


@root
def test_an_endpoint_that_another_user_planted_is_not_used(open_box: Box) -> None:
    """In /tmp anybody may make the directory that we look into."""
    planted = open_box.path / "planted"
    (planted / "nats").mkdir(parents=True)
    endpoint = planted / "nats/client.json"
    endpoint.write_bytes((open_box.state / "nats/client.json").read_bytes())
    for path, mode in ((planted, 0o755), (planted / "nats", 0o755), (endpoint, 0o644)):
        path.chmod(mode)
    config = open_box.path / "planted.toml"
    config.write_text(f'state_dir = "{planted}"\n')
    config.chmod(0o644)
    ((code, out, err),) = as_nobody(config, [[{}, "runctl", "-c", str(config), "list"]])
    assert (code, out) == (4, "")
    assert err == (
        f"runctl: {endpoint} belongs to user id 0, and this is {NOBODY};"
        " run runctl as the user that runs runctld\n"
    )
