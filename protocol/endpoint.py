"""Where the embedded server is, and how clients of its user know it."""

from __future__ import annotations

import msgspec

from ..config.schema import Login, Nats

#: Path of the ``Endpoint`` file below the state directory.
ENDPOINT_FILE = "nats/client.json"


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
