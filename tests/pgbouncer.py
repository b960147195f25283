"""A real PgBouncer before a real PostgreSQL, on loopback, where one is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from conftest import wait_until
from pgserver import Postgres, free_port

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
#: Why it cannot be used here, or nothing.
MISSING = "" if PROGRAM else "pgbouncer is not installed (apt-get install pgbouncer)"


class Bouncer:
    """Before all databases of ``server``. ``mode``: session, transaction or statement."""

    def __init__(self, server: Postgres, mode: str, more: str = "") -> None:
        self.path = Path(tempfile.mkdtemp(prefix="runctl-pgbouncer-"))
        self.port = free_port()
        users = self.path / "users"
        users.write_text('"postgres" ""\n')
        config = self.path / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={server.port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\n"
            f"unix_socket_dir =\nauth_type = trust\nauth_file = {users}\n"
            f"pool_mode = {mode}\n{more}"
        )
        self.start()

    def start(self) -> None:
        assert PROGRAM is not None
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # it refuses to be root
            os.chmod(self.path, 0o755)
            as_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        with (self.path / "log").open("wb") as log:
            argv = [PROGRAM, str(self.path / "pgbouncer.ini")]
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, cwd="/", **as_user)
        wait_until(self._listens, "pgbouncer listens")

    def _listens(self) -> bool:
        assert self._process.poll() is None, (self.path / "log").read_text()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def url(self, direct: str) -> str:
        """``direct``, an URL of the server, through this."""
        before, _, rest = direct.partition("@")
        return f"{before}@127.0.0.1:{self.port}/{rest.partition('/')[2]}"

    def restart(self) -> None:
        self._process.kill()
        self._process.wait()
        self.start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.path)
