"""A systemd of the test's own: process 1 of its own PID, mount, IPC, UTS and cgroup
namespaces. What it may write to is its own as well: tmpfs over /tmp, /run, /var, /home and
/root, copies of /etc and /dev, a cgroup of its own; the rest of /proc/sys and /sys is
read-only. Nothing of the host is touched, and all of it goes with process 1."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, wait_until
from proc import direct_children, read_proc

ROOT = Path(__file__).parent.parent
SYSTEMD = Path("/lib/systemd/systemd")
_HIDDEN = ("/tmp", "/run", "/var", "/root", "/home")
_TOOLS = ("unshare", "nsenter", "setpriv", "mount", "umount", "systemctl", "systemd-sysusers")
#: What no test of ours needs, and a host would notice.
_CAPABILITIES = "audit_control audit_read sys_module sys_time sys_rawio syslog net_admin mac_admin"

_BOOT = r"""
set -e
umount -R -l /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,bind,ro /sys
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys

mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/etc /mnt/dev /mnt/keep
cp -a /etc/. /mnt/etc
rm -rf /mnt/etc/systemd/system /mnt/etc/runctl
mkdir -p /mnt/etc/systemd/system /mnt/etc/systemd/journald.conf.d
for node in null zero full random urandom tty; do
    touch /mnt/dev/$node && mount --bind /dev/$node /mnt/dev/$node
done
mkdir /mnt/dev/pts /mnt/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /mnt/dev/pts
ln -s pts/ptmx /mnt/dev/ptmx
mount -t tmpfs -o mode=1777 none /mnt/dev/shm
n=0
for path in $KEEP; do
    mkdir /mnt/keep/$n && mount --bind $path /mnt/keep/$n
    n=$((n + 1))
done
mount --rbind /mnt/etc /etc
mount --rbind /mnt/dev /dev
for path in $HIDDEN; do mount -t tmpfs -o mode=755 none $path; done
mkdir -p /run/systemd/system /var/log /var/lib /var/tmp
chmod 1777 /tmp /var/tmp
n=0
for path in $KEEP; do
    mkdir -p $path && mount --bind /mnt/keep/$n $path
    n=$((n + 1))
done

# Among these namespaces, not with the host's, from which all was made private: systemd mounts
# credentials in a child and means to see them.
mount --make-rshared /

# No Audit= at all: it would switch the kernel's auditing.
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=\n' > /etc/systemd/journald.conf.d/test.conf
ln -s /dev/null /etc/systemd/system/systemd-journald-audit.socket
printf '[Unit]\nDefaultDependencies=no\nWants=systemd-journald.service\n' \
    > /etc/systemd/system/testing.target
cp $UNITS/*.service /etc/systemd/system/
systemd-sysusers $UNITS/sysusers.conf
systemd-tmpfiles --create $UNITS/tmpfiles.conf
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin $SETPRIV \
    $SYSTEMD --system --unit=testing.target --show-status=no
"""


def why_not() -> str | None:
    """What this machine lacks."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make namespaces"
    if not SYSTEMD.exists():
        return f"there is no {SYSTEMD}; apt install systemd"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"there is no {missing[0]}"
    names = "--pid --mount --ipc --uts --cgroup --mount-proc --fork"
    probe = subprocess.run(
        ["unshare", *names.split(), "mount", "-t", "cgroup2", "none", "/mnt"],
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        return f"namespaces are not permitted here: {probe.stderr.strip()}"
    try:
        folder = own_cgroup() / f"runctl-probe-{os.getpid()}"
        folder.mkdir()
        killable = (folder / "cgroup.kill").exists()
        folder.rmdir()
    except (OSError, StopIteration) as error:
        return f"no cgroup (version 2) can be made here: {error}"
    return None if killable else "this kernel has no cgroup.kill (Linux 5.14)"


def own_cgroup() -> Path:
    """The directory of this process's cgroup."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    place = next(line[3:] for line in lines if line.startswith("0::"))
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounted = next(a.split()[4] for a, b in mounts if b.startswith("cgroup2 "))
    return Path(mounted) / place.lstrip("/")


def remove_cgroup(folder: Path) -> None:
    """End what is in it."""
    (folder / "cgroup.kill").write_text("1")

    def removed() -> bool:
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        return not folder.exists()

    wait_until(removed, f"{folder} is empty")


class Machine:
    def __init__(self) -> None:
        self.cgroup = own_cgroup() / f"runctl-test-{os.getpid()}-{time.time_ns()}"
        self.cgroup.mkdir()
        keep = [p for p in self._needed() if p.startswith(tuple(f"{h}/" for h in _HIDDEN))]
        drop = ",".join(f"-{name}" for name in _CAPABILITIES.split())
        env = {
            **os.environ,
            "KEEP": " ".join(keep),
            "HIDDEN": " ".join(_HIDDEN),
            "UNITS": str(ROOT / "systemd"),
            "SYSTEMD": str(SYSTEMD),
            "SETPRIV": f"setpriv --bounding-set {drop}",
        }
        names = "--fork --kill-child --pid --mount --ipc --uts --cgroup --mount-proc"
        enter = f"echo $$ > {self.cgroup}/cgroup.procs; exec unshare {names} sh -c '{{}}'"
        script = _BOOT.replace("'", "'\\''")
        self._outer = subprocess.Popen(
            ["sh", "-c", enter.replace("{}", script)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.init = 0
        try:
            self._up()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _needed() -> list[str]:
        """The project and the Python that runs it."""
        paths = [str(ROOT), sys.prefix, sys.base_prefix]
        return [p for p in dict.fromkeys(paths) if not any(p.startswith(f"{q}/") for q in paths)]

    def _up(self) -> None:
        pid = self._outer.pid

        def booted() -> bool:
            if self._outer.poll() is not None:
                assert self._outer.stdout is not None
                raise AssertionError(self._outer.stdout.read().decode())
            children = direct_children(pid)
            if not children:
                return False
            self.init = children[0]
            if read_proc(self.init, "comm").strip() != b"systemd":
                return False
            found = self.call("systemctl", "is-active", "testing.target", check=False)
            return found.strip() == "active"

        wait_until(booted, "systemd is up")
        # A cgroup that hands out controllers may hold no process itself.
        (own_cgroup() / "cgroup.procs").write_text(str(pid))

    def call(self, *argv: str, check: bool = True, user: str | None = None) -> str:
        """stdout of a command in there."""
        names = ["--mount", "--pid", "--ipc", "--uts", "--cgroup"]
        become = []
        if user is not None:
            become = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
        done = subprocess.run(
            ["nsenter", "--target", str(self.init), *names, *become, *argv],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr, self.journal())
        return done.stdout

    def journal(self) -> str:
        names = ["--mount", "--pid", "--ipc", "--uts", "--cgroup"]
        argv = ["journalctl", "--no-pager", "-n", "80", "-o", "short-monotonic"]
        found = subprocess.run(
            ["nsenter", "--target", str(self.init), *names, *argv], capture_output=True, text=True
        )
        return found.stdout

    def write(self, path: str, text: str) -> None:
        """A file in there."""
        target = Path(f"/proc/{self.init}/root") / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def show(self, unit: str, name: str) -> str:
        return self.call("systemctl", "show", unit, "--property", name, "--value").strip()

    def main_pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID"))

    def kill(self, pid: int, number: signal.Signals) -> None:
        self.call("kill", f"-{number.value}", str(pid))

    def bind_lines(self) -> str:
        """For a unit: what its ProtectHome= and PrivateTmp= would hide of the project."""
        hidden = ("/home/", "/root/", "/tmp/", "/var/tmp/")
        lines = [f"BindReadOnlyPaths={p}" for p in self._needed() if p.startswith(hidden)]
        return "\n".join(["ProtectHome=tmpfs", *lines])

    def close(self) -> None:
        self._outer.kill()
        self._outer.wait()
        assert self._outer.stdout is not None
        self._outer.stdout.close()
        remove_cgroup(self.cgroup)


def skip_without() -> None:
    if reason := why_not():
        pytest.skip(f"a systemd of the test's own: {reason}")


def as_json(text: str) -> list[Any]:
    import json

    return [json.loads(line) for line in text.splitlines()]
