"""The roles that docs/cluster.md makes, on a real PostgreSQL: what each may do, and no more."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg
import pytest
from conftest import wait_until
from house import House
from test_foreign_rows import submit, wait_for

DOCS = Path(__file__).parent.parent / "docs" / "cluster.md"

pytestmark = pytest.mark.long


def documented(title: str) -> list[str]:
    """The statements below ``-- title`` in the documents."""
    blocks = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(f"-- {title}"))
    lines = [line for line in block.splitlines() if not line.startswith("--")]
    return [text for text in " ".join(lines).split(";") if text.strip()]


def test_roles_with_the_rights_that_they_need(house: House) -> None:
    name = house.url.rpartition("/")[2]

    def play(title: str) -> None:
        for text in documented(title):
            house.sql(text.replace("DATABASE runctl", f"DATABASE {name}"))

    def url(role: str) -> str:
        return house.url.replace("postgres@", f"{role}@")

    try:
        play("the owner")
        first = house.box("a", url=url("runctl_owner"))
        first.term()
        play("the daemon")
        box = house.box("a", url=url("runctl"))
        (run, killed) = submit(box, ["t", "u"], "sleep", "600")
        wait_for(box, [run, killed], "running")
        box.runctl("abort", "t")
        box.kill()
        box.start()
        wait_until(lambda: box.show(killed)["attempt"] == 2, "it is replayed")
        wait_until(lambda: box.show(killed)["attempts"][0]["end"] == "died", "that is noted")
        box.runctl("abort", "u")
        assert submit(box, ["v"], "true")
        box.runctl("purge", "t", "u", "--yes")
        assert not re.search(r"permission denied|must be owner", box.log.read_text())
        assert not box.warnings()
        for text in (
            "CREATE TABLE dbos.x ()",
            "CREATE TABLE runctl.x ()",
            "CREATE TABLE public.x ()",
            "CREATE TEMP TABLE x ()",
            "CREATE SCHEMA x",
            "DROP TABLE dbos.workflow_status",
            "ALTER TABLE dbos.workflow_status ADD COLUMN x text",
            "TRUNCATE dbos.workflow_status CASCADE",
            "DELETE FROM dbos.dbos_migrations",
            "CREATE TRIGGER x AFTER INSERT ON dbos.workflow_status"
            " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                house.postgres.sql(text, url=url("runctl"))

        play("whoever looks")
        looks = url("runctl_looks")
        assert house.postgres.sql("SELECT status FROM dbos.workflow_status", url=looks)
        assert house.postgres.sql("SELECT id FROM runctl.executors", url=looks)
        for text in (
            "SELECT inputs FROM dbos.workflow_input",
            "SELECT output FROM dbos.workflow_output",
            "SELECT inputs FROM dbos.workflow_status",
            "UPDATE dbos.workflow_status SET status = 'ENQUEUED'",
            "DELETE FROM runctl.executors",
            "INSERT INTO dbos.workflow_events VALUES ('x', 'x', 'x')",
            "CREATE TEMP TABLE x ()",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                house.postgres.sql(text, url=looks)
    finally:
        house.close()
        for role in ("runctl_looks", "runctl", "runctl_owner"):
            if house.sql("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
                house.sql(f"DROP OWNED BY {role} CASCADE")
                house.sql(f"DROP ROLE {role}")
