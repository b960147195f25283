"""What is used of libraries although it is private to them: it is all listed, it is touched in one
file each, and its lack is told before anything is begun."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from runctl.config import nats_internals
from runctl.config.private_names import PrivateNames
from runctl.config.schema import ConfigError
from runctl.supervisor.host import asyncpg_internals
from runctl.supervisor.queue import dbos_internals, dbos_log

ROOT = Path(__file__).parents[1]
PRODUCT = ("supervisor", "cli", "client", "config", "gateway", "protocol")
DBOS_FILE = ROOT / "supervisor/queue/dbos_internals.py"

NATS_FILE = ROOT / "config/nats_internals.py"

ASYNCPG_FILE = ROOT / "supervisor/host/asyncpg_internals.py"

LISTS = {
    "asyncpg": [asyncpg_internals.PRIVATE],
    "dbos": [dbos_internals.PRIVATE],
    "nats-py": [nats_internals.PRIVATE, nats_internals.PRIVATE_OF_SERVICES],
}
ENTRIES = [
    pytest.param(package, names, module, entry, id=f"{module}.{entry.partition('(')[0]}")
    for package, lists in LISTS.items()
    for names in lists
    for module, entries in names.names.items()
    for entry in entries
]


def parts(package: str) -> set[str]:
    """The single names of the paths that are listed."""
    entries = [e for names in LISTS[package] for module in names.names.values() for e in module]
    return {part for entry in entries for part in entry.partition("(")[0].split(".")}


def again(names: PrivateNames, package: str) -> PrivateNames:
    """The same list, not checked yet."""
    return PrivateNames(package, package, names.version, names.names)


def product_files() -> Iterator[Path]:
    for folder in PRODUCT:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", LISTS)
def test_the_installed_release_has_them_all(package: str) -> None:
    locked = (ROOT / "requirements.lock").read_text()
    for names in LISTS[package]:
        again(names, package).check()
        assert f"\n{package}=={names.version} " in locked, "the version that messages name"


@pytest.mark.parametrize(("package", "names", "module", "entry"), ENTRIES)
def test_one_that_is_gone_is_noticed(
    monkeypatch: pytest.MonkeyPatch, package: str, names: PrivateNames, module: str, entry: str
) -> None:
    names = again(names, package)
    owner: Any = importlib.import_module(module)
    path = entry.partition("(")[0]
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    remove(monkeypatch, owner, name)
    with pytest.raises(ConfigError) as raised:
        names.check()
    said = str(raised.value)
    minor = names.version.rpartition(".")[0]
    assert said.startswith(f"{package} {version(package)} lacks {module}.{path}")
    assert said.endswith(f"; install {package}~={minor}.0 ({names.version} has it)")
    assert "\n" not in said


def remove(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    if type(owner).__name__.endswith("ColumnCollection"):  # a table without this column
        table = next(iter(owner)).table
        rest = [column for column in owner if column.name != name]
        monkeypatch.setattr(table, "c", type("Columns", (), {c.name: c for c in rest}))
        return
    if is_there := hasattr(owner, name):
        holder = owner
        while isinstance(holder, type) and name not in vars(holder):
            holder = holder.__mro__[1]
        is_there = not inspect.ismemberdescriptor(getattr(holder, name))
        monkeypatch.delattr(holder, name)
    if not is_there:  # instances only have it, also where there is a slot for it
        for made in (owner.__init__, getattr(owner, "reset", owner.__init__)):
            code: CodeType = made.__code__
            known = tuple(f"{x}_" if x == name else x for x in code.co_names)
            monkeypatch.setattr(made, "__code__", code.replace(co_names=known))


@pytest.mark.parametrize(
    ("package", "names", "module", "entry"), [p for p in ENTRIES if "(" in str(p.values[3])]
)
def test_an_argument_that_is_gone_is_noticed(
    monkeypatch: pytest.MonkeyPatch, package: str, names: PrivateNames, module: str, entry: str
) -> None:
    owner: Any = importlib.import_module(module)
    path, _, arguments = entry.rstrip(")").partition("(")
    for part in path.split("."):
        owner = getattr(owner, part)
    wanted = [name.strip() for name in arguments.split(",") if name.strip() not in ("", "...")]
    function = inspect.unwrap(owner)
    code: CodeType = function.__code__
    for gone in wanted:
        known = tuple(f"{x}_" if x == gone else x for x in code.co_varnames)
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", code.replace(co_varnames=known))
            with pytest.raises(ConfigError, match=re.escape(path)):
                again(names, package).check()


def test_what_is_replaced_must_be_there() -> None:
    class Owner:
        here = 1

    for owner in (Owner, Owner(), dbos_internals):
        with pytest.raises(ConfigError, match=r"DBOS \S+ lacks .*\.gone; install dbos~=3\.4\.0"):
            dbos_internals.replace(owner, "gone", 2)
        assert not hasattr(owner, "gone")
    assert dbos_internals.replace(Owner, "here", 2) == 1
    assert Owner.here == 2


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def touched(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names with an underscore of anything but oneself, and where."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
            if not own:
                yield node.attr, node.lineno


#: Of Python's own objects, which are documented.
PYTHONS = {"_exit", "_replace"}


def test_no_other_file_touches_a_private_name() -> None:
    for file in product_files():
        if file in (ASYNCPG_FILE, DBOS_FILE, NATS_FILE):
            continue
        tree = ast.parse(file.read_text())
        where = file.relative_to(ROOT)
        for name in imports(tree):
            theirs = name.partition(".")[0] not in (*sys.stdlib_module_names, "processes")
            assert not (theirs and is_private(name)), (where, name)
        own = own_names(tree) | PYTHONS
        for name, line in touched(tree):
            assert name in own, (where, line, name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in BY_TEXT:
                asked, (called, *_) = node.args[0], (*node.args[1:], node.args[0])
                if getattr(asked, "id", "") != "self" and isinstance(called, ast.Constant):
                    assert not is_private(str(called.value)), (where, node.lineno)


BY_TEXT = ("getattr", "setattr", "hasattr", "delattr")


def own_names(tree: ast.AST) -> set[str]:
    """What the classes of a file call their own, which its functions may use."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            found.add(node.attr)
    return found


#: What the one file calls DBOS's modules and objects.
THEIRS = {
    *("_context", "_core", "_launch", "_formats", "_system", "_utils", "_commands"),
    *("_dbos", "_database", "instance", "registry", "system"),
}


def test_each_private_name_of_dbos_in_use_is_listed() -> None:
    tree = ast.parse(DBOS_FILE.read_text())
    listed = parts("dbos")
    used, known = set(), set(dbos_internals.PICKLE_READERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            known.add(node.attr)
            # Of the modules themselves the check speaks.
            private = is_private(node.attr) and name not in ("self", "dbos")
            if private or name in THEIRS:
                used.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            used.add(ast.literal_eval(node.args[1]))
        elif isinstance(node, ast.FunctionDef):
            known.add(node.name)
    used |= set(dbos_internals.PICKLE_READERS)
    assert {"startup_recovery_thread", "_sys_db", "tables"} <= used, "this looks at nothing"
    assert used <= listed, sorted(used - listed)
    # And nothing is listed that is not in use: of the rows others ask for the columns, and of
    # classes we have the objects only.
    elsewhere = {"SystemSchema", "workflow_status", "workflow_input", "workflow_output", "c"}
    elsewhere |= {"DBOS", "DBOSRegistry", "Queue", "dumps", "loads", *dbos_internals._COLUMNS}
    assert listed <= used | known | elsewhere, sorted(listed - used - known - elsewhere)


#: What our own classes in the file of nats-py's names have.
OURS = {"_now", "_nats", "_pinned", "_tls_first", "_as_utf8", "_was_told"}
OURS |= {"_BoundedParser", "_EmbeddedTransport"}


def test_each_private_name_of_nats_in_use_is_listed() -> None:
    tree = ast.parse(NATS_FILE.read_text())
    listed, used = parts("nats-py"), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.FunctionDef | ast.AsyncFunctionDef):
            used.add(node.attr if isinstance(node, ast.Attribute) else node.name)
    private = {name for name in used if is_private(name)} - OURS
    assert {"_process_msg", "_server_info"} <= private, "this looks at nothing"
    assert private <= listed, sorted(private - listed)
    imported = {name.rpartition(".")[2] for name in imports(tree)}
    classes = {"Client", "Parser", "Subscription", "TcpTransport", "Request"}
    assert listed <= used | imported | classes, sorted(listed - used - imported - classes)


def test_dbos_says_what_is_kept_out_of_the_log() -> None:
    """In these words."""
    sources = Path(str(sysconfig.get_path("purelib"))) / "dbos"
    text = " ".join(file.read_text() for file in sources.glob("_*.py"))
    for words in dbos_log.EXPECTED:
        assert words in text, words


BROKEN = {
    "DBOS": ("dbos", "_core", "ActiveWorkflowById.count_for_queue"),
    "nats-py": ("nats", "aio.client", "Client._process_headers"),
}


@pytest.mark.parametrize("title", BROKEN)
@pytest.mark.parametrize("verb", ["start", "doctor", "list"])
def test_a_release_without_one_is_named_at_once(tmp_path: Path, verb: str, title: str) -> None:
    """One line and exit code 78 of the daemon; doctor says it as well, and whoever needs it."""
    package, module, name = BROKEN[title]
    gone = f"{package}.{module}.{name}"
    (tmp_path / "sitecustomize.py").write_text(f"import {package}.{module}\ndel {gone}\n")
    config = tmp_path / "runctld.toml"
    text = f'state_dir = "{tmp_path / "state"}"\n'
    if verb == "list":
        text += '[nats]\nurl = "nats://127.0.0.1:1"\ninsecure = true\n'
    config.write_text(text)
    module = "supervisor.main" if verb == "start" else "cli.start"
    argv = [sys.executable, "-c", f"from runctl.{module} import main; main()", "-c", str(config)]
    done = subprocess.run(
        argv if verb == "start" else [*argv, verb],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    package = {"DBOS": "dbos"}.get(title, title)
    names = LISTS[package][0]
    minor = names.version.rpartition(".")[0]
    said = f"{title} {version(package)} lacks {gone}"
    fix = f"install {package}~={minor}.0 ({names.version} has it)"
    if verb == "start":
        assert done.returncode == 78, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"runctld: {said}")
        assert done.stderr.endswith(f"; {fix}\n")
        assert "Traceback" not in done.stderr
    elif verb == "doctor":
        assert done.returncode == 1, done.stdout
        assert "FAIL  versions" in done.stdout
        assert said in done.stdout
        assert f"-> {fix}" in done.stdout
        assert "Traceback" not in done.stderr
    elif title == "nats-py":
        assert done.returncode == 4, done.stderr
        assert done.stderr.startswith(f"runctl: {said}")
        assert done.stderr.count("\n") == 1
    else:
        assert "lacks" not in done.stderr, "the command line does without DBOS"
