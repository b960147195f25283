"""What one key of a configuration is: the kind of its value with its unit and bounds, a line of
documentation, whether a running daemon takes it over, and what of it is secret.

Each is written once, as the annotation of its field in ``schema``: reading, ``--check``,
``doctor``, SIGHUP and the list in docs/configuration.md follow it. A field without one is no key.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import msgspec


class Key(msgspec.Struct, frozen=True):
    """``doc``: one line, Markdown. ``live``: a reload with SIGHUP is enough. ``secret``: no part
    of its value may be shown. ``default``: what stands in the documentation as such, where the
    schema cannot say it. ``example``: the key has to be set, to something like this."""

    doc: str
    live: bool = False
    secret: bool = False
    default: str = ""
    example: str = ""


class Own(Key, frozen=True):
    """Read by a rule of its section's own. ``form``: what a value looks like, in words."""

    form: str = "a string"


class Text(Key, frozen=True):
    """``empty``: it may be."""

    empty: bool = False


class Url(Key, frozen=True):
    """``schemes``: those that it may have; () when its section has a rule of its own. Its
    password, and what else in it is secret, is hidden; ``many`` are separated by commas."""

    schemes: tuple[str, ...] = ()
    many: bool = False
    form: str = ""


class Flag(Key, frozen=True):
    pass


class Whole(Key, frozen=True):
    least: int = 0
    most: int = 1_000_000_000


class Number(Key, frozen=True):
    least: float = 0.0
    most: float = 0.0


class Seconds(Key, frozen=True):
    least: float = 0.0


class Size(Key, frozen=True):
    """Bytes."""

    least: int = 0


class Choice(Key, frozen=True):
    """One of the strings in the field's ``Literal``."""


class FilePath(Key, frozen=True):
    """``holds``: "secret", so that nobody else may read the file, or "trust": it says whom to
    trust or what to run, so that nobody else may write it. "" for neither."""

    holds: Literal["", "secret", "trust"] = ""


class Argv(Key, frozen=True):
    """A command and its arguments."""


class Environment(Key, frozen=True):
    """Variables, for each ``each``, by their names; none of ``taken``. Values are not shown."""

    each: str = "run"
    taken: tuple[str, ...] = ()


class Hidden:
    """The annotation of a field that is no key, and that nobody is to see."""


class Entry(NamedTuple):
    """A field of a section. ``key`` None: not one that a file may set. ``part``: the section
    that it is, instead. ``type``: what its value is. ``default``: msgspec's NODEFAULT for none.
    ``hidden``: a part of its value may be secret."""

    name: str
    key: Key | None
    part: "type[Section] | None"
    type: Any
    default: Any
    hidden: bool

    @property
    def choices(self) -> tuple[str, ...]:
        found = get_args(self.type)
        literals = [part for part in found if get_origin(part) is Literal]
        return get_args(literals[0]) if literals else found


class Section(msgspec.Struct, frozen=True):
    """A table of a file, once it is read. Its ``repr`` holds no secrets. ``inapplicable``: fields
    of the section it derives from that a file may not set."""

    inapplicable: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        shown = (
            f"{entry.name}={getattr(self, entry.name)!r}"
            for entry in entries(type(self))
            if not entry.hidden
        )
        return f"{type(self).__name__}({', '.join(shown)})"


@cache
def entries(section: type[Section]) -> tuple[Entry, ...]:
    """The fields of ``section``, in order."""
    names, defaults = section.__struct_fields__, section.__struct_defaults__
    default_of = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    annotations: dict[str, Any] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section) and base is not Section:
            annotations |= base.__annotations__
    found = []
    for name, kind in annotations.items():
        if isinstance(kind, str):
            raise TypeError(f"{section.__name__}: its module must not postpone annotations")
        marks = getattr(kind, "__metadata__", ())
        value = kind.__origin__ if marks else kind
        key = next((mark for mark in marks if isinstance(mark, Key)), None)
        part = value if isinstance(value, type) and issubclass(value, Section) else None
        if name in section.inapplicable:
            key = part = None
        default = default_of.get(name, msgspec.NODEFAULT)
        factory = getattr(default, "factory", None)
        default = default if factory is None else factory()
        hidden = Hidden in marks or isinstance(key, Url | Environment)
        hidden = hidden or (key is not None and key.secret)
        found.append(Entry(name, key, part, value, default, hidden))
    return tuple(found)


def keys_of(section: type[Section]) -> list[tuple[str, Key]]:
    """(name, key) of those that its table may hold and that are no tables of their own."""
    return [(entry.name, entry.key) for entry in entries(section) if entry.key is not None]


def names_of(section: type[Section]) -> list[str]:
    """The keys that its table may hold, tables among them."""
    return [entry.name for entry in entries(section) if entry.key is not None or entry.part]


def walk(section: Section, above: str = "") -> Iterator[tuple[str, Key, Any]]:
    """(full name, key, value) of each key in ``section`` and the sections in it."""
    for entry in entries(type(section)):
        name, value = above + entry.name, getattr(section, entry.name)
        if entry.key is not None:
            yield name, entry.key, value
        inner = {name: value}
        if isinstance(value, dict):
            inner = {f"{name}.{each}": part for each, part in value.items()}
        for each, part in inner.items():
            if isinstance(part, Section) and (entry.part or entry.key):
                yield from walk(part, f"{each}.")
