"""``make audit``: what runctl is locked to, as a CycloneDX SBOM, and whether any of it has a known
advisory. Run by the Python of .venv-audit, which has pip-audit and cyclonedx-bom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
#: Seconds that PyPI may take for one answer, and all of them together.
ANSWER, WHOLE = 15, 300


def judge(report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what has an advisory, what could not be looked up) of pip-audit's JSON, a line each."""
    found, unknown = [], []
    for package in report["dependencies"]:
        if (reason := package.get("skip_reason")) is not None:
            unknown.append(reason)
            continue
        name = f"{package['name']} {package['version']}"
        for advisory in package["vulns"]:
            mended = ", ".join(advisory["fix_versions"]) or "no release"
            found.append(f"{name}: {advisory['id']}, mended in {mended}")
    return found, unknown


def main(sbom: Path) -> int:
    tools = Path(sys.executable).parent
    sbom.parent.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [tools / "cyclonedx-py", "requirements", LOCK]
    command += ["--output-reproducible", "--pyproject", ROOT / "pyproject.toml"]
    command += ["--output-format", "JSON", "--output-file", sbom]
    subprocess.run(command, check=True)
    listed = json.loads(sbom.read_text())["components"]
    print(f"audit: {sbom} lists {len(listed)} packages")
    command = [tools / "pip-audit", "--requirement", LOCK, "--require-hashes", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", str(ANSWER)]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=WHOLE)
        found, unknown = judge(json.loads(asked.stdout))
    except (subprocess.TimeoutExpired, ValueError):  # it has written no report
        print("audit: advisories skipped: those of PyPI cannot be reached")
        return 0
    for line in found:
        print(f"audit: {line}", file=sys.stderr)
    if unknown:
        print(f"audit: advisories skipped of {len(unknown)} packages: {unknown[0]}")
    elif not found:
        print("audit: no known advisory")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
