"""What processes were started with. Standard library only: the keeper imports it."""

import os

from . import credentials


def environment(pid: int) -> list[bytes]:
    """What ``pid`` was started with; nothing if it is gone, dead or not ours to see. Who may
    become its user sees what that user does."""
    try:
        try:
            return read_environment(pid)
        except PermissionError:
            owner = os.stat(f"/proc/{pid}")
            if owner.st_uid in (0, os.geteuid()):
                return []
            with credentials.acting_as(owner.st_uid, owner.st_gid):
                return read_environment(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def read_environment(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        return file.readall().split(b"\0")
