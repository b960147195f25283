"""Whether the tests see it when a guard is gone: each entry of guards.toml takes one away, in a
copy of the tree, and its test must then fail.

    python tests/mutants.py [NAME...]

Exit code 1: a test did not fail, or an entry does not fit the tree any more.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tomli

ROOT = Path(__file__).parents[1]
PRODUCT = ("supervisor", "client", "cli", "config", "gateway", "protocol")
#: Of the tree, what a test may need.
COPIED = (*PRODUCT, "systemd", "tests", "docs", "deploy", "faults", "bench", "agents")
FILES = ("pyproject.toml", "README.md", "Makefile", "Containerfile", "CHANGELOG.md", "LICENSE")
#: A test that takes longer than this, in seconds, hangs.
HANGS = 300.0


class Guard(NamedTuple):
    """``guards``: what would be lost without it. ``old`` stands once in the product; with
    ``new`` in its place the guard is gone, and ``test``, a pytest node, fails."""

    name: str
    guards: str
    old: str
    new: str
    test: str


class Misfit(Exception):
    """An entry does not fit the tree: one line."""


def read_guards() -> list[Guard]:
    table = tomli.loads((ROOT / "tests/guards.toml").read_text())
    return [Guard(**entry) for entry in table["guard"]]


def find_file(guard: Guard, root: Path = ROOT) -> Path:
    """The one file of the product that holds ``guard.old``. Raises Misfit."""
    found = [
        (path, count)
        for folder in PRODUCT
        for path in sorted((root / folder).rglob("*.py"))
        if (count := path.read_text().count(guard.old))
    ]
    if not found:
        raise Misfit("its text is not found")
    if sum(count for _, count in found) > 1:
        places = ", ".join(str(path.relative_to(root)) for path, _ in found)
        raise Misfit(f"its text stands more than once: {places}")
    return found[0][0]


def apply(guard: Guard, path: Path) -> str:
    """The text of ``path`` without the guard. Raises Misfit, when that is no Python."""
    text = path.read_text().replace(guard.old, guard.new)
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise Misfit(f"with it changed {path.name} is no Python: {error}") from None
    return text


def check_test(guard: Guard, root: Path = ROOT) -> None:
    """Raises Misfit, when there is no such test."""
    file, _, rest = guard.test.partition("::")
    name = rest.partition("[")[0]
    path = root / file
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if not any(isinstance(node, functions) and node.name == name for node in tree.body):
        raise Misfit(f"there is no test {guard.test}")


class Copy:
    """A copy of the tree, and an interpreter that imports runctl from there: with the packages
    of the environment that runs this, and without its editable install of runctl."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
        for file in FILES:
            shutil.copy(ROOT / file, root / file)
        names = root / ".names" / "runctl"
        names.mkdir(parents=True)
        for folder in (*PRODUCT, "systemd"):
            (names / folder).symlink_to(root / folder)
        venv.create(root / ".venv", with_pip=False)
        site = root / ".venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        # Plain paths: the .pth files of the other environment are not followed.
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site / "copy.pth").write_text("\n".join([str(names.parent), *sorted(paths)]) + "\n")
        self.python = root / ".venv/bin/python"
        # Programs that came with packages, such as nats-server, are looked for beside Python.
        for program in Path(sys.prefix, "bin").iterdir():
            there = root / ".venv/bin" / program.name
            if there.exists() or not os.access(program, os.X_OK):
                continue
            shutil.copy(program, there)
            shebang = f"#!{sys.prefix}/bin/python".encode()
            if (data := program.read_bytes()).startswith(shebang):
                there.write_bytes(data.replace(shebang, f"#!{root}/.venv/bin/python".encode(), 1))
        place = self._python("-c", "import runctl.supervisor as s; print(*s.__path__)").strip()
        assert Path(place).is_relative_to(root), f"{place} would be tested"

    def _python(self, *args: str) -> str:
        run = subprocess.run([self.python, *args], capture_output=True, text=True, check=True)
        return run.stdout

    @contextmanager
    def without(self, guard: Guard) -> Iterator[None]:
        """While this is open the copy lacks the guard. Raises Misfit."""
        path = find_file(guard, self.root)
        before = path.read_text()
        self._write(path, apply(guard, path))
        try:
            yield
        finally:
            self._write(path, before)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # Python knows by size and second whether what it has compiled is the file's.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def run_tests(self, nodes: Iterable[str], most: float) -> tuple[int | None, str]:
        """(pytest's exit code, None when they hang; what it said)."""
        command = [str(self.python), "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *nodes]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        env |= {"RUNCTL_LONG": "1", "PATH": f"{self.python.parent}:{env['PATH']}"}
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as tests:
            try:
                said, _ = tests.communicate(timeout=most)
                return tests.returncode, said
            except subprocess.TimeoutExpired:
                # As if somebody had pressed Ctrl-C, so that they end what they have started.
                for number, patience in ((signal.SIGINT, 60), (signal.SIGKILL, None)):
                    os.killpg(tests.pid, number)
                    try:
                        said, _ = tests.communicate(timeout=patience)
                        break
                    except subprocess.TimeoutExpired:
                        continue
                return None, said


def failed_tests(said: str) -> list[str]:
    """The tests that failed, not those that could not be begun, of what pytest -rfE said."""
    return re.findall(r"^FAILED (\S+)", said, re.MULTILINE)


def try_guard(copy: Copy, guard: Guard) -> tuple[bool, str]:
    """(whether its test sees that it is gone, the verdict)."""
    try:
        with copy.without(guard):
            code, said = copy.run_tests([guard.test], HANGS)
    except Misfit as error:
        return False, str(error)
    if code is None:
        return True, "killed (its test hangs)"
    if code == 0:
        return False, "SURVIVED: its test passes without it"
    if code == 1 and failed_tests(said):
        return True, "killed"
    return False, f"its test did not get as far as to fail:\n{said[-3000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a guard; default: all")
    names = parser.parse_args().names
    guards = read_guards()
    if unknown := set(names) - {guard.name for guard in guards}:
        parser.error(f"no guard is called {', '.join(sorted(unknown))}")
    chosen = [guard for guard in guards if not names or guard.name in names]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder))
        nodes = list(dict.fromkeys(guard.test for guard in chosen))
        code, said = copy.run_tests(nodes, HANGS * len(nodes))
        if code != 0:
            print(f"the tests fail where no guard is gone:\n{said[-6000:]}")
            return 1
        print(f"{len(nodes)} tests pass with all guards in place", flush=True)
        survived = 0
        for guard in chosen:
            began = time.monotonic()
            seen, verdict = try_guard(copy, guard)
            survived += not seen
            print(f"{guard.name:24} {time.monotonic() - began:4.0f} s  {verdict}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} guards are seen to be gone")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
