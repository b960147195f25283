"""Machines of their own as network namespaces: a bridge, and a cable to each that can be
pulled. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess

#: Of this process alone: others may do the same at the same time.
_PART = f"10.213.{os.getpid() % 250 + 1}"
NETWORK, HERE = f"{_PART}.0/24", f"{_PART}.1"


def why_not() -> str:
    """Why there can be no namespaces here; "" when there can."""
    if shutil.which("ip") is None:
        return "network namespaces need iproute2: apt install iproute2"
    name = f"rcprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    bridge = subprocess.run(
        ["ip", "link", "add", f"rp{os.getpid()}", "type", "bridge"], capture_output=True, text=True
    )
    if bridge.returncode:
        return f"bridges are not allowed here: {bridge.stderr.strip()}"
    subprocess.run(["ip", "link", "del", f"rp{os.getpid()}"], check=True)
    return ""


class Namespaces:
    """One for each of ``names``; this side has the address ``HERE`` on the bridge."""

    def __init__(self, names: list[str]) -> None:
        self._id = os.getpid()
        self._names = names
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        bridge = f"rb{self._id}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{HERE}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for n, name in enumerate(self._names):
            space, cable = self._space(name), self._cable(name)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", bridge, "up")
            address = HERE.rpartition(".")[0] + f".{n + 2}/24"
            for command in (
                ("link", "set", "lo", "up"),
                ("addr", "add", address, "dev", "eth0"),
                ("link", "set", "eth0", "up"),
            ):
                _ip("-n", space, *command)

    def _space(self, name: str) -> str:
        return f"rc{self._id}{name}"

    def _cable(self, name: str) -> str:
        return f"rv{self._id}{name}"

    def prefix(self, name: str) -> list[str]:
        """What a command is run by to be on that machine."""
        return ["ip", "netns", "exec", self._space(name)]

    def pull(self, name: str) -> None:
        _ip("link", "set", self._cable(name), "down")

    def plug(self, name: str) -> None:
        _ip("link", "set", self._cable(name), "up")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"rb{self._id}"], capture_output=True)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
