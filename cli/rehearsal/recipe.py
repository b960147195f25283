"""What is rehearsed, and the configuration of the private daemon that runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...config.keys import FilePath, entries
from ...config.load import find_file, read_toml
from ...config.read_keys import RUNNER_KINDS, all_names
from ...config.runners import read_runners
from ...config.schema import CommandRunner, ConfigError, PushRunner
from ...config.typed_table import Table
from ...protocol.errors import BadRequest

#: Kills are what a rehearsal is for: no number of them makes the run dead.
PATIENT = 1_000_000


class Recipe(msgspec.Struct, frozen=True):
    """The work, as ``submit`` takes it. ``settings``: the keys of ``runner`` in the user's
    configuration; None for the built-in ``shell``."""

    argv: Sequence[str]
    prompt: str | None = None
    runner: str | None = None
    settings: Mapping[str, Any] | None = None

    def write_config(self, file: Path, state: Path) -> None:
        lines = [
            f"state_dir = {_toml(str(state))}",
            "[queue]",
            f"max_attempts = {PATIENT}",
            f"max_total_attempts = {PATIENT}",
        ]
        if self.settings is not None:
            lines.append(f"[runners.{self.runner}]")
            lines += [f"{_toml(key)} = {_toml(value)}" for key, value in self.settings.items()]
        file.write_text("\n".join([*lines, ""]))
        file.chmod(0o600)


def find_runner(name: str, config: Path | None) -> Mapping[str, Any] | None:
    """The settings of runner ``name``, paths made absolute; None for a ``shell`` that is not
    configured. Raises ConfigError; BadRequest, there is no such runner, or it is another user's."""
    file = config or find_file()
    values = {} if file is None else read_toml(file.absolute())
    found = values.get("runners", {})
    if not isinstance(found, dict) or name not in found:
        if name == "shell":
            return None
        names = ", ".join(sorted(found)) if isinstance(found, dict) and found else "no runners"
        where = "there is no configuration file" if file is None else f"{file} has: {names}"
        raise BadRequest(f"no runner {name!r}: {where}")
    assert file is not None
    top = Table(file.absolute(), "", {"runners": {name: found[name]}}, all_names)
    runner = read_runners(top.table("runners"), True)[name]
    if isinstance(runner, PushRunner):
        raise BadRequest(f"runner {name!r} is for work that is done elsewhere: nothing to rehearse")
    if isinstance(runner, CommandRunner) and runner.account is not None:
        raise BadRequest(
            f"runner {name!r} is run as user {runner.user}: rehearse it as that user, with a"
            " configuration in which the runner has no user"
        )
    paths = {x.name for x in entries(RUNNER_KINDS[found[name]["kind"]]) if _is_path(x.key)}
    return {
        key: _absolute(value, file.absolute().parent) if key in {*paths, "cwd"} else value
        for key, value in found[name].items()
    }


def _is_path(key: object) -> bool:
    return isinstance(key, FilePath)


def _absolute(value: Any, folder: Path) -> Any:
    """The temporary configuration is elsewhere."""
    if not isinstance(value, str) or value == "submitter" or value.startswith(("/", "~", "$")):
        return value
    return str(folder / value)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # The escapes of JSON are TOML's, but for one half of a pair, and DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml(k)} = {_toml(v)}' for k, v in value.items())} }}"
    raise ConfigError(f"a {type(value).__name__} cannot be a setting of a runner")
