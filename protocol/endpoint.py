"""What the state directory tells clients of its user: whether a daemon is to be expected, and where
its embedded server is."""

from __future__ import annotations

import msgspec

from ..config.schema import Login, Nats

#: Path of the ``Endpoint`` file below the state directory.
ENDPOINT_FILE = "nats/client.json"
#: Likewise of the daemon's lock. It holds a line while a daemon has it, and after one that did
#: not stop in order.
LOCK_FILE = "lock"


class Endpoint(msgspec.Struct, frozen=True):
    """``state_dir/nats/client.json`` (0600): how clients of this user reach the embedded
    server, and know it. ``certificate``: the only one, PEM, that it may show; "" where an
    older daemon wrote this. The password is another one at each start of the server, and the
    port when somebody else has taken it: whoever connects reads this anew."""

    url: str
    user: str
    password: str
    certificate: str = ""

    def __repr__(self) -> str:
        return f"Endpoint(url={self.url!r})"

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def nats(self) -> Nats:
        """As it is connected to."""
        login = Login(self.user, self.password)
        return Nats(self.url, login=login, certificate=self.certificate)
