"""The gateway as a service of a real systemd, beside a daemon's: see machine.py."""

from __future__ import annotations

import signal
import sys

import httpx
import pytest
from conftest import DEADLINE, wait_until
from daemon_unit import DaemonUnit
from machine import ROOT, Machine
from pgserver import free_port
from test_gateway_access import READER, bearer, table
from test_gateway_hub import Viewer

UNIT = "runctl-gateway.service"
CONFIG = 'executor_id = "box-1"\nstate_dir = "/var/lib/runctl"\n'
STEPS = "import time\nfor n in range({count}):\n    print('step', n, flush=True); time.sleep(0.1)"
#: What takes the place of the distribution's runctl, and of a boot's other services.
TEST = f"""
[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart={sys.executable} -m runctl.cli.main gateway --listen ${{LISTEN}}
WatchdogSec=4
TimeoutAbortSec=1
"""


class GatewayUnit:
    """As it is installed, at a port of its own by a drop-in."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.write("/etc/runctl/runctld.toml", CONFIG)
        self.write_drop_in("zz-test", TEST + machine.bind_lines())
        self.port = free_port()
        self.listen(f"127.0.0.1:{self.port}")

    def write_drop_in(self, name: str, text: str) -> None:
        self.machine.write(f"/etc/systemd/system/{UNIT}.d/{name}.conf", text)
        self.machine.call("systemctl", "daemon-reload")

    def listen(self, address: str) -> None:
        self.write_drop_in("address", f"[Service]\nEnvironment=LISTEN={address}\n")

    def show(self, name: str) -> str:
        return self.machine.show(UNIT, name)

    @property
    def pid(self) -> int:
        return self.machine.main_pid(UNIT)

    def client(self) -> httpx.Client:
        url = f"http://127.0.0.1:{self.port}"
        return httpx.Client(base_url=url, timeout=DEADLINE, trust_env=False)


@pytest.fixture(scope="module")
def gateway(machine: Machine) -> GatewayUnit:
    return GatewayUnit(machine)


def test_it_serves_before_beside_and_after_its_daemon(machine: Machine, gateway: GatewayUnit):
    machine.call("systemctl", "start", UNIT)  # returns with READY=1
    with gateway.client() as client:
        assert client.get("/").status_code == 200
        assert gateway.show("StatusText") == f"http://127.0.0.1:{gateway.port}/"
        daemon, pid = DaemonUnit(machine, CONFIG), gateway.pid
        assert client.get("/v1/threads").status_code == 503  # there has been none yet
        daemon.systemctl("start", daemon.name)
        argv = [sys.executable, "-c", STEPS.format(count=50)]
        made = client.post("/v1/threads/t/runs", json={"argv": argv})
        assert made.status_code == 201, made.text
        viewer = Viewer()
        with client.stream("GET", f"/v1/runs/{made.json()['run']}/events") as events:
            rest, restarted = b"", False
            for data in events.iter_bytes():
                *frames, rest = (rest + data).split(b"\n\n")
                for frame in frames:
                    if b"event: " in frame:
                        viewer.hear(frame + b"\n\n")
                if viewer.chunks and not restarted:
                    daemon.systemctl("restart", daemon.name)
                    restarted = True
        assert viewer.ended
        assert "".join(viewer.chunks) == "".join(f"step {n}\n" for n in range(50))
        assert viewer.told.count("reset") == 1
        daemon.systemctl("stop", daemon.name)
        assert "runctld is not running" in client.get("/v1/threads").json()["detail"]
    assert gateway.pid == pid
    # It may read what is the daemon's, and write nothing of it.
    inside = ("nsenter", "--target", str(pid), "--mount")
    become = ("setpriv", "--reuid", "runctl", "--regid", "runctl", "--clear-groups")
    machine.call(*inside, *become, "ls", "/var/lib/runctl/nats")
    machine.call(*inside, "sh", "-c", "! touch /var/lib/runctl/there")


def test_a_loop_that_is_stuck_is_ended_by_the_watchdog(machine: Machine, gateway: GatewayUnit):
    machine.call("systemctl", "start", UNIT)
    pid = gateway.pid
    machine.kill(pid, signal.SIGSTOP)

    def is_another() -> bool:
        return gateway.show("ActiveState") == "active" and gateway.pid not in (0, pid)

    wait_until(is_another, "it is started again")
    # faulthandler's, on SIGABRT: where it was stuck.
    wait_until(
        lambda: "most recent call first" in machine.call("journalctl", f"_PID={pid}", "-o", "cat"),
        "and says where it was stuck",
    )


def test_tokens_and_another_address(machine: Machine, gateway: GatewayUnit):
    machine.call("systemctl", "stop", UNIT)
    assert gateway.show("Result") == "success"
    gateway.listen(f"0.0.0.0:{gateway.port}")
    machine.call("systemctl", "start", UNIT, check=False)
    wait_until(lambda: gateway.show("ActiveState") == "failed", "nobody says who may ask there")
    assert (gateway.show("ExecMainStatus"), gateway.show("NRestarts")) == ("2", "0")
    gateway.listen(f"127.0.0.1:{gateway.port}")
    machine.write("/etc/runctl/tokens.toml", table("reader", READER, '"read"'))
    machine.write(
        "/etc/runctl/runctld.toml",
        f'{CONFIG}[gateway]\ntokens_file = "/etc/runctl/tokens.toml"\n',
    )
    machine.call("systemd-tmpfiles", "--create", str(ROOT / "systemd/tmpfiles.conf"))
    assert "640 root runctl" in machine.call("stat", "-c", "%a %U %G", "/etc/runctl/tokens.toml")
    machine.call("systemctl", "start", UNIT)
    with gateway.client() as client:
        assert client.get("/v1/openapi.json").status_code == 401
        assert client.get("/v1/openapi.json", headers=bearer(READER)).status_code == 200
