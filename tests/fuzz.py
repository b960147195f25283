"""Coverage-guided fuzzing of ``bounds.py``: ``make fuzz SECONDS=60``, or

    python tests/fuzz.py SECONDS [TARGET ...]

Needs atheris (wheels for Linux and some versions of CPython); without it this says so and
ends well. Each target gets its share of the time, begins with ``corpus/TARGET``, and has a
process of its own. Input that shows a defect is kept there as ``found-...``: mend the
defect, and `make test` replays it from then on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main(seconds: float, names: list[str]) -> int:
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"fuzz: skipped, atheris is not there for Python {version}, {sys.platform}: {error}")
        return 0
    from bounds import TARGETS

    names = names or list(TARGETS)
    bad = []
    for name in names:
        print(f"fuzz: {name}", flush=True)
        command = [sys.executable, __file__, "--one", name, str(int(max(1, seconds / len(names))))]
        if subprocess.run(command, cwd=HERE.parent).returncode:
            bad.append(name)
    print(f"fuzz: {len(names)} targets, defects in: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


def one(name: str, seconds: str) -> None:
    import atheris

    with atheris.instrument_imports(include=["runctl", "tomli", "httpx_sse"]):
        import bounds
    target = bounds.TARGETS[name]
    kept = bounds.CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as new:
        arguments = [
            sys.argv[0],
            f"-max_total_time={seconds}",
            "-timeout=25",
            "-max_len=20000",
            "-rss_limit_mb=2048",
            f"-artifact_prefix={kept}/found-",
            "-print_final_stats=1",
            "-verbosity=0",
            new,
            str(kept),
        ]
        atheris.Setup(arguments, target)
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:4])
    else:
        sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
