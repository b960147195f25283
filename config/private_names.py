"""Names of a library that are private to it, and in use here: each is checked before the first
of them is used, so that a release without it is refused in one line instead of failing later,
or of going on without what we put in its place."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from .schema import ConfigError


class PrivateNames:
    """Those of the package ``package``, which messages call ``title``. ``version`` has all.

    ``names``: by module, each a dotted path, such as ``Class.method``; ``Class.attribute`` is also
    what its ``__init__`` or ``reset`` gives to each object, ``table.c.column`` a column. Behind a
    function stand, in parentheses, the arguments that it must know; with ``...`` at the end it may
    know others as well, which what we put in its place would not.
    """

    def __init__(
        self, title: str, package: str, version: str, names: Mapping[str, Sequence[str]]
    ) -> None:
        self._title = title
        self._package = package
        self.version = version
        self.names = names
        self._checked = False

    def check(self) -> None:
        """Raises ConfigError, which names the first that the installed release lacks."""
        if self._checked:
            return
        for module, entries in self.names.items():
            try:
                found = importlib.import_module(module)
            except ImportError:
                raise self.lacking(module) from None
            for entry in entries:
                path, mark, arguments = entry.rstrip(")").partition("(")
                if not _has(found, path, arguments if mark else None):
                    gone = entry if _has(found, path) else path
                    raise self.lacking(f"{module}.{gone}")
        self._checked = True

    def replace(self, owner: Any, name: str, value: Any) -> Any:
        """Put ``value`` in the place of the attribute ``name`` of ``owner``: a module, a class or
        an object. What was there. Raises ConfigError when nothing was: the installed release
        does not use it any more, and ``value`` would do nothing."""
        if not hasattr(owner, name):
            raise self.lacking(f"{_describe(owner)}.{name}")
        was = getattr(owner, name)
        setattr(owner, name, value)
        return was

    def lacking(self, name: str) -> ConfigError:
        """The error that says that ``name`` is gone."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed = version(self._package)
        except PackageNotFoundError:
            installed = "that is installed"
        minor = self.version.rpartition(".")[0]
        return ConfigError(
            f"{self._title} {installed} lacks {name}; install {self._package}~={minor}.0"
            f" ({self.version} has it)"
        )


def _has(owner: Any, path: str, arguments: str | None = None) -> bool:
    for name in path.split("."):
        if hasattr(owner, name):
            owner = getattr(owner, name)
        elif isinstance(owner, type):
            # An attribute of its instances: a name that is known where they are made.
            made = (getattr(owner, method, None) for method in _MAKING)
            return any(name in getattr(_code(method), "co_names", ()) for method in made)
        else:
            return False
    if getattr(owner, "__isabstractmethod__", False):  # a base class only says that it is wanted
        return False
    if arguments is None:
        return True
    code = _code(owner)
    if code is None:
        return False
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    wanted = [name.strip() for name in arguments.split(",") if name]
    if wanted[-1:] == ["..."]:
        return set(wanted[:-1]) <= set(known)
    return wanted == [name for name in known if name != "self"]


#: Methods that set what instances have.
_MAKING = ("__init__", "reset")


def _code(function: Any) -> Any:
    return getattr(inspect.unwrap(function), "__code__", None)


def _describe(owner: Any) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"
