"""TOML file -> ``Config``.

Whatever is wrong with a file is one ``ConfigError`` of one line: file, key, what was
expected and what was found, or the fix. A secret never appears in a message.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import tomli

from .files import MOST_TOML, read_bounded
from .keys import Section, names_of
from .nats import read_nats
from .read_keys import all_names, read_keys
from .schema import (
    START_TIMEOUT,
    Config,
    ConfigError,
    Database,
    FileError,
    Gateway,
    History,
    Hooks,
    Log,
    Metrics,
    Runner,
    Stream,
    Takeover,
    Traces,
)
from .secrets import find_withheld
from .sections import read_executor_id, read_queue
from .typed_table import Table, xdg_dir

SYSTEM_FILE = Path("/etc/runctl/runctld.toml")


def load(path: Path | None = None, *, client: bool = False, gateway: bool = False) -> Config:
    """The configuration in ``path``, or in the first default place that has one.

    With ``client`` only what is needed to find the daemon is read: ``runners`` stays
    empty, ``database`` and ``takeover`` are the defaults, and an ``executor_id`` that
    names an unset variable is None, since an operator's shell has neither the daemon's
    keys nor its pod name. ``gateway``: and what a gateway needs, which is such a client.
    Raises ConfigError.
    """
    file = Path(path) if path is not None else find_file()
    if file is None:
        return Config(state_dir=_default_state_dir(client), runners=_default_runners(client))
    file = file.absolute()
    return _read_config(Table(file, "", read_toml(file), all_names), client, gateway)


def find_file() -> Path | None:
    """$RUNCTL_CONFIG, else the system's file, else the user's; None if there is none.

    A file that is there but cannot be seen into counts as found: using another one
    silently would mean another state directory."""
    if named := os.environ.get("RUNCTL_CONFIG"):
        return Path(named)
    user_file = xdg_dir("XDG_CONFIG_HOME", ".config") / "runctl" / "runctld.toml"
    for file in (SYSTEM_FILE, user_file):
        try:
            os.lstat(file)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise FileError(_unreadable(file, error)) from error
        return file
    return None


def _unreadable(file: Path, error: OSError) -> str:
    return (
        f"{file}: cannot be read: {error.strerror}: be the user that runs runctld,"
        " or name another file with --config"
    )


def _default_state_dir(client: bool) -> Path:
    """For a service of systemd what StateDirectory= made; a client that is part of some
    other service has nothing to find there. A client in a run is told by its daemon."""
    made = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if made and not client:
        return Path(made)
    told = os.environ.get("RUNCTL_STATE", "")
    if client and os.path.isabs(told):
        return Path(told)
    return xdg_dir("XDG_STATE_HOME", ".local/state") / "runctl"


def _default_runners(client: bool) -> dict[str, Runner]:
    if client:
        return {}
    from .runners import add_shell

    return add_shell({}, True)


def read_toml(file: Path) -> dict[str, Any]:
    """What is in it, as it is written. Raises ConfigError."""
    try:
        return tomli.loads(read_bounded(file, MOST_TOML).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file: create it, or name another") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{file}: is a directory: name the file in it") from error
    except PermissionError as error:
        raise FileError(_unreadable(file, error)) from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        # Not only TOMLDecodeError: a number of 5,000 digits is a plain ValueError.
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: is not valid TOML: {reason}") from error


def _read_config(top: Table, client: bool, gateway: bool) -> Config:
    values = read_keys(Config, top)
    nats = read_nats(top.table("nats"), client)
    if client:
        parts = _check_names(top)
        if gateway:
            from .gateway import find_other_users, read_gateway

            parts["gateway"] = read_gateway(top.table("gateway"))
            find_other_users(parts["gateway"], top)
    else:
        from .daemon_sections import read_daemons

        parts = read_daemons(top, nats, values.get("allow_shell", True))
    database, takeover = parts.get("database", Database()), parts.get("takeover", Takeover())
    environment = values.get("environment", "development")
    config = Config(
        state_dir=values.pop("state_dir", None) or _default_state_dir(client),
        source=top.file,
        executor_id=read_executor_id(top, environment, database, client),
        nats=nats,
        stream=Stream(**read_keys(Stream, top.table("stream"))),
        queue=read_queue(top.table("queue"), takeover, values.get("start_timeout", START_TIMEOUT)),
        history=History(**read_keys(History, top.table("history"))),
        log=Log(**read_keys(Log, top.table("log"))),
        **values,
        **parts,
    )
    return msgspec.structs.replace(config, withheld=find_withheld(top, config))


#: What may come from variables that only the daemon has.
_DAEMONS: dict[str, type[Section]] = {
    "database": Database,
    "takeover": Takeover,
    "metrics": Metrics,
    "traces": Traces,
    "hooks": Hooks,
    "gateway": Gateway,
}


def _check_names(top: Table) -> dict[str, Any]:
    """Nothing, when they have no key that they cannot have: a client needs none of them."""
    for name, section in _DAEMONS.items():
        top.table(name).only(names_of(section))
    return {}
