"""``runctld`` that counts its SQL statements and commits: ``python -m bench.counted FILE
ARGUMENTS..`` writes them to FILE when it stops, as JSON."""

from __future__ import annotations

import atexit
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from runctl.supervisor.main import main
from sqlalchemy.engine import Engine

COUNTS: Counter[str] = Counter()


def count(file: Path) -> None:
    @sa.event.listens_for(Engine, "before_cursor_execute")
    def on_statement(*arguments: Any) -> None:
        verb = str(arguments[2]).split(maxsplit=1)[0]
        COUNTS["reads" if verb in ("SELECT", "WITH") else "writes"] += 1

    @sa.event.listens_for(Engine, "commit")
    def on_commit(_: Any) -> None:
        COUNTS["commits"] += 1

    atexit.register(lambda: file.write_text(json.dumps(COUNTS)))


if __name__ == "__main__":
    count(Path(sys.argv.pop(1)))
    main()
