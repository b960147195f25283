"""deploy/kubernetes: valid for real clusters' schemas, and true to what runctld does; the
manifests' own configuration, environment and probe commands are run for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from conftest import SLACK, Box, wait_until
from externals import NatsServer
from pgserver import Postgres
from runctl.cli.health.probe import LIMIT
from runctl.cli.main import main as runctl
from runctl.config.load import load
from runctl.config.schema import ConfigError
from runctl.config.transport import check_transport

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
TOML = FOLDER / "runctld.toml"
OBJECTS = {
    document["kind"]: document
    for file in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
}
POD = OBJECTS["StatefulSet"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
#: What the daemon takes at most to end, on top of stop_grace: 3 s to stop claiming and
#: reap, 5 s for the queue's thread, 3 s to hand over, 10 s for the keeper, and a second
#: each for the database, NATS and the lease; and some for a machine that is busy.
MARGIN = 30


def environment(name: str = "runctl-0") -> dict[str, str]:
    """What the manifest gives a container of the pod ``name``."""
    found = {}
    for entry in CONTAINER["env"]:
        source = entry.get("valueFrom", {})
        if source.get("fieldRef", {}).get("fieldPath") == "metadata.name":
            found[entry["name"]] = name
        elif "secretKeyRef" in source:
            found[entry["name"]] = "postgresql://runctl:secret@pg/runctl?sslmode=verify-full"
        else:
            found[entry["name"]] = entry["value"]
    return found


@pytest.mark.short
@pytest.mark.parametrize("version", ["1.28", "1.32", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["StatefulSet", "Service", "PodDisruptionBudget"])
def test_manifests_are_valid(kind: str, version: str) -> None:
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


@pytest.mark.short
def test_every_file_is_applied_and_every_reference_is_there() -> None:
    build = OBJECTS["Kustomization"]
    files = {file.name for file in FOLDER.iterdir()}
    (generated,) = build["configMapGenerator"]
    assert {"kustomization.yaml", *build["resources"], *generated["files"]} == files
    assert build["images"][0]["name"] == CONTAINER["image"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert volumes["config"]["configMap"]["name"] == generated["name"]
    (file,) = generated["files"]
    assert environment()["RUNCTL_CONFIG"] == f"{mounts['config']}/{file}"
    labels = OBJECTS["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["StatefulSet"]["spec"]["serviceName"] == OBJECTS["Service"]["metadata"]["name"]


@pytest.mark.short
def test_the_configuration_loads_as_the_pod_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment("runctl-2").items():
        monkeypatch.setenv(key, value)
    config = load(TOML)
    assert (config.executor_id, config.environment) == ("runctl-2", "production")
    check_transport(config)
    assert POD["terminationGracePeriodSeconds"] >= config.queue.stop_grace + MARGIN
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > 2 * config.start_timeout
    assert config.nats.credentials is not None
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]}
    assert config.nats.credentials.parent == mounts["nats"]
    # A mount belongs to root, and a state directory to its daemon.
    assert config.state_dir.parent == mounts["state"]
    monkeypatch.delenv("POD_NAME")
    with pytest.raises(ConfigError, match=r"POD_NAME is not set: .*fieldRef metadata\.name"):
        load(TOML)


@pytest.mark.short
@pytest.mark.parametrize("name", PROBES)
def test_probes_are_ours_and_have_the_time_they_take(name: str) -> None:
    probe = CONTAINER[name]
    program, *arguments = probe["exec"]["command"]
    assert program == "runctl"
    said = CliRunner().invoke(runctl, [*arguments, "--help"])
    assert said.exit_code == 0, said.output
    assert arguments[:2] == ["status", "--probe"]
    assert arguments[2] == ("live" if name == "livenessProbe" else "ready")
    assert probe["timeoutSeconds"] >= LIMIT + 2, "the interpreter starts first"
    said = CliRunner().invoke(runctl, ["status", "--probe", "nonsense"])
    assert said.exit_code == 2


@pytest.mark.short
def test_the_pod_is_confined() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    inner = CONTAINER["securityContext"]
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False
    user = str(POD["securityContext"]["runAsUser"])
    assert f"USER {user}:{user}\n" in (ROOT / "Containerfile").read_text()


# ---- the real thing ---------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path, postgres: Postgres) -> Iterator[tuple[Postgres, NatsServer]]:
    """A database server, and a NATS that the test may stop and start."""
    path = tmp_path / "nats"
    path.mkdir()
    nats = NatsServer(path)
    try:
        nats.start()
        yield postgres, nats
    finally:
        nats.stop()


class Pod(Box):
    """runctld started as the manifest says, as far as that goes without a container: the
    state directory, the credentials and the number of replicas are the machine's."""

    def __init__(self, path: Path, name: str, database: str, nats: NatsServer) -> None:
        path.mkdir()
        super().__init__(path)
        text = TOML.read_text()
        for old, new in (
            ('"/var/lib/runctl/state"', f'"{self.state}"'),
            ('credentials = "/etc/runctl-nats/nats.creds"', ""),
            ("replicas = 3", "replicas = 1"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        self.config.write_text(text + '[runners.worker]\nkind = "command"\n')
        urls = {"RUNCTL_DATABASE_URL": database, "RUNCTL_NATS_URL": nats.url}
        self.env = {**os.environ, **environment(name), **urls}
        self.env["RUNCTL_CONFIG"] = str(self.config)
        self.env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def begin(self) -> None:
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                CONTAINER["command"], env=self.env, stderr=log, cwd=self.path
            )

    def probe(self, name: str) -> tuple[int, str]:
        """(exit code, what it said), within the time that the manifest gives it."""
        done = subprocess.run(
            CONTAINER[name]["exec"]["command"],
            env=self.env,
            timeout=CONTAINER[name]["timeoutSeconds"] * SLACK,
            capture_output=True,
            text=True,
        )
        return done.returncode, (done.stdout + done.stderr).strip()

    def popen(self, *args: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        return super().popen(*args, env=self.env, **kwargs)


@pytest.fixture
def pods(tmp_path: Path, both: tuple[Postgres, NatsServer]) -> Iterator[list[Pod]]:
    postgres, nats = both
    database = postgres.database()
    made = [Pod(tmp_path / f"p{n}", f"runctl-{n}", database, nats) for n in range(2)]
    try:
        yield made
    finally:
        for pod in made:
            if pod.daemon is not None and pod.daemon.poll() is None:
                pod.daemon.send_signal(signal.SIGCONT)
                pod.daemon.kill()
                pod.daemon.wait()
            pod.close()


@pytest.mark.long
@pytest.mark.nightly
def test_probes_mean_what_they_say(pods: list[Pod], both: tuple[Postgres, NatsServer]) -> None:
    first, second = pods
    first.begin()
    wait_until(lambda: first.probe("startupProbe")[0] == 0, "started")
    code, said = second.probe("readinessProbe")
    assert (code, "runctl-1 does not answer" in said) == (4, True), "another one's answer counted"
    assert second.probe("livenessProbe")[0] == 4
    second.begin()
    wait_until(lambda: second.probe("startupProbe")[0] == 0, "started")
    alive = (0, "executor runctl-0 is alive, 0 running")
    wait_until(lambda: first.probe("livenessProbe") == alive, "alive")
    run = first.runctl("submit", "t", "--runner", "worker", "--", "sleep", "600").strip()
    wait_until(lambda: first.show(run)["status"] == "running", "runs")

    assert first.daemon is not None
    first.daemon.send_signal(signal.SIGSTOP)
    assert first.probe("readinessProbe")[0] == 4
    assert first.probe("livenessProbe")[0] == 4, "it hangs, and NATS is there"
    wait_until(lambda: second.probe("readinessProbe")[0] == 0, "the other one is ready")
    first.daemon.send_signal(signal.SIGCONT)
    wait_until(lambda: first.probe("readinessProbe")[0] == 0, "ready again")

    both[1].stop()
    for pod in pods:
        assert pod.probe("readinessProbe")[0] == 4
        code, said = pod.probe("livenessProbe")
        assert (code, said.startswith("taken as alive")) == (0, True), said
    both[1].start()
    wait_until(lambda: first.probe("readinessProbe")[0] == 0, "ready again")
    assert first.show(run)["attempt"] == 1, "NATS was away, and the run went on"


def test_a_pod_that_is_stopped_hands_over_in_time(pods: list[Pod]) -> None:
    first, second = pods
    first.begin()
    wait_until(lambda: first.probe("startupProbe")[0] == 0, "started")
    code = "import time; print('up', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    run = first.runctl("submit", "t", "--runner", "worker", "--", *command).strip()
    wait_until(lambda: first.show(run)["status"] == "running", "runs")
    second.begin()
    wait_until(lambda: second.probe("startupProbe")[0] == 0, "started")
    assert first.daemon is not None
    began = time.monotonic()
    first.daemon.terminate()
    assert first.daemon.wait(POD["terminationGracePeriodSeconds"]) == 0
    print(f"ended after {time.monotonic() - began:.2f} s")
    shown = wait_until(
        lambda: (x := second.show(run))["executor"] == "runctl-1" and x, "handed over"
    )
    assert shown["attempt"] == 2
