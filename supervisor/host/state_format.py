"""The format of what a daemon leaves behind: its state directory, and a shared database.

``FORMAT`` rises when an older daemon could misread, or spoil, what a newer one writes.
What has no mark is of format 1. Records in the stream have a version of their own
(``records.VERSION``), and so do the workflows in the database (``row_access.APP_VERSION``).
"""

from __future__ import annotations

from pathlib import Path

from ...protocol.errors import ConfigError
from .private_files import write_private

FORMAT = 1
#: Below the state directory: the number of its format.
FILE = "format"
MOST_DIGITS = 9


def check_format(state_dir: Path) -> None:
    """Before anything in it is changed. Raises ConfigError when it is a newer runctl's."""
    file = state_dir / FILE
    try:
        text = file.read_bytes()[:100].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    if not (text.isdigit() and len(text) <= MOST_DIGITS):
        raise ConfigError(
            f"{file}: does not hold the number of a format; if this version wrote the"
            f" directory, write {FORMAT} into the file"
        )
    refuse_newer(int(text), f"state_dir {state_dir}")


def refuse_newer(found: int, what: str) -> None:
    """Raises ConfigError."""
    if found > FORMAT:
        raise ConfigError(
            f"{what} was written by a newer runctl (format {found}, this one reads up to"
            f" {FORMAT}); install that version again, or choose another one. Nothing was changed"
        )


def mark_format(state_dir: Path) -> None:
    """What is there is ours from here on. The caller holds the directory's lock."""
    file = state_dir / FILE
    wanted = f"{FORMAT}\n"
    if file.exists() and file.read_text() == wanted:
        return
    write_private(file, wanted.encode())
