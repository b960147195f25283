"""``python -m runctl.gateway.main``: arguments, logging, exit codes. ``runctl gateway`` becomes
this, and the daemon starts it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import logging
import os
import resource
import sys
from pathlib import Path

from ..config.access import check_access
from ..config.gateway import USUAL, find_open_door
from ..config.integrations import split_listen
from ..config.load import load
from ..config.schema import Config, FileError
from ..config.secrets import Masker
from ..config.typed_table import Table
from ..protocol import descriptors, hardening
from ..protocol.errors import ConfigError, Unavailable
from ..protocol.model import one_line

log = logging.getLogger("runctl.gateway")

#: As of ``runctl``: what cannot be reached or read, what is configured wrongly.
UNAVAILABLE, USAGE, FAILED = 4, 2, 1


def main(arguments: list[str] | None = None) -> int:
    hardening.close_process()
    descriptors.fill()
    faulthandler.enable()  # a watchdog's SIGABRT then writes where it was stuck, no values
    parser = argparse.ArgumentParser(prog="runctl gateway", allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--listen")
    given = parser.parse_args(arguments)
    try:
        _run(load(given.config, client=True, gateway=True), given.listen)
    except (Unavailable, FileError) as error:
        return _say(error, UNAVAILABLE)
    except ConfigError as error:
        return _say(error, USAGE)
    except OSError as error:
        return _say(error, FAILED)
    return 0


def _run(config: Config, address: str | None) -> None:
    """Raises ConfigError, Unavailable."""
    check_access(config)
    address = address or config.gateway.listen or USUAL
    _check_address(config, address)
    _set_up_log(config)
    raise_file_limit()
    from .access import Access
    from .server import listen, serve

    access = Access(config.gateway, address)
    if config.gateway.tokens_file is None and not config.gateway.trusted_proxies:
        log.warning(
            "every user of this machine can connect to %s, and may do everything there:"
            " gateway.tokens_file says who may",
            address,
        )
    with contextlib.closing(listen(address)) as listener:
        asyncio.run(serve(config, address, listener, access))


def _check_address(config: Config, address: str) -> None:
    """Raises ConfigError."""
    split_listen(address, Table(Path("--listen"), "", {}, list))
    if (problem := find_open_door(config.gateway, address)) is not None:
        raise ConfigError(f"gateway.listen: {problem}")


def _set_up_log(config: Config) -> None:
    """Lines on stderr. Errors of uvicorn's name no address and no header."""
    hide = Masker(config)

    class Masked(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return hide(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(Masked("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log.level.upper(), handlers=[handler])
    logging.getLogger("nats").setLevel(logging.CRITICAL + 1)  # what it logs is told in one line
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # of each bad request it would warn


def raise_file_limit() -> None:
    """A connection is a file each."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _say(error: Exception, code: int) -> int:
    with contextlib.suppress(OSError):
        os.write(2, f"runctl: {one_line(' '.join(str(error).split()))}\n".encode(errors="replace"))
    return code


if __name__ == "__main__":
    sys.exit(main())
