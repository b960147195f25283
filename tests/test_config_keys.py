"""Each key stands once, in the schema: what is read, shown, masked, reloaded and documented
follows it. (Annotations are not postponed here: a section's are looked at.)"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec.structs import replace
from runctl.config import keys
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.read_keys import RUNNER_KINDS, all_names, read_keys
from runctl.config.schema import ChatRunner, CommandRunner, Config, ConfigError
from runctl.config.secrets import Masker
from runctl.config.typed_table import Table
from runctl.supervisor.lifecycle.reload import differences

pytestmark = pytest.mark.short

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/configuration.md"


def sections() -> Iterator[tuple[str, type[keys.Section]]]:
    """(its header in a file and what must stand below it, the section)"""
    yield "", Config
    for entry in keys.entries(Config):
        if entry.part is not None:
            yield f"[{entry.name}]\n", entry.part
    for kind, section in RUNNER_KINDS.items():
        yield f'[runners.x]\nkind = "{kind}"\n', section


def documented() -> dict[str, list[str]]:
    """The keys in the page, by the headings above them."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            heading = found.setdefault(line.removeprefix("## "), [])
        elif line.startswith("| `"):
            heading.append(line.split("`")[1])
    return found


def test_the_page_is_current(tmp_path: Path) -> None:
    new = tmp_path / "configuration.md"
    subprocess.run([sys.executable, str(ROOT / "docs/configkeys.py"), str(new)], check=True)
    assert new.read_text() == PAGE.read_text(), "docs/configuration.md is stale: make keys"


def test_page_and_schema_have_the_same_keys() -> None:
    page = documented()
    found = set(page.pop("At the top"))
    for heading, names in page.items():
        part = heading.partition("]")[0].strip("[")
        found |= {f"{part}.{name}" for name in names}
    limits = {f"runners.NAME.limits.{name}" for name in keys.names_of(keys_of_limits())}
    parts = {entry.name for entry in keys.entries(Config) if entry.part} | {"runners"}
    assert found | parts | {"runners.NAME.limits"} == set(all_names()) | limits


def keys_of_limits() -> type[keys.Section]:
    (part,) = (x.part for x in keys.entries(CommandRunner) if x.part is not None)
    return part


def test_what_is_not_in_the_schema_is_neither_read_nor_documented(tmp_path: Path) -> None:
    file, looked = tmp_path / "runctld.toml", 0
    for header, section in sections():
        fields = [x.name for x in keys.entries(section) if x.key is None and x.part is None]
        for name in (*fields, "of_no_section"):
            file.write_text(f'{header}{name} = "x"\n')
            with pytest.raises(ConfigError, match=rf"{name}: (unknown key|is for kind)"):
                load(file)
            elsewhere = name in section.inapplicable
            found = name in [key for names in documented().values() for key in names]
            assert found is elsewhere
            looked += 1
    assert looked > 15

    class Strange(keys.Section, frozen=True):
        kept: Annotated[str, keys.Text("Kept.")] = ""
        other: str = ""

    table = Table(file, "", {"kept": "a"}, list)
    assert Strange(**read_keys(Strange, table)) == Strange("a")
    with pytest.raises(ConfigError, match="other: unknown key"):
        read_keys(Strange, Table(file, "", {"kept": "a", "other": "b"}, list))


def test_every_key_says_in_one_line_what_it_is() -> None:
    for _, section in sections():
        for name, key in keys.keys_of(section):
            assert key.doc.endswith("."), name
            assert "\n" not in key.doc, name
            assert "|" not in key.doc, name
            assert len(key.doc) <= 100, name


def test_a_reload_names_what_waits_as_the_schema_says() -> None:
    config, looked = Config(Path("/a")), 0
    for entry in keys.entries(Config):
        if entry.part is None:
            if entry.key is None or entry.name in ("runners", "allow_shell"):
                continue
            other = replace(config, **{entry.name: "another"})
            assert differences(config, other) == [(entry.name, entry.key.live)]
            continue
        for name, key in keys.keys_of(entry.part):
            part = replace(getattr(config, entry.name), **{name: "another"})
            other = replace(config, **{entry.name: part})
            assert differences(config, other) == [(f"{entry.name}.{name}", key.live)]
            looked += key.live
    assert looked == 7, "of the queue"


CANARY = "canary-5dd1-77aa"


def secret_value(key: keys.Key, name: str) -> Any:
    if isinstance(key, keys.Url):
        scheme = "postgresql" if "url" in name and not key.many and not key.schemes else "http"
        return f"{scheme}://me:{CANARY}@h/x"
    if isinstance(key, keys.Environment):
        return {"A_TOKEN": CANARY}
    return {"Authorization": f"Bearer {CANARY}"} if name == "headers" else f"https://h/{CANARY}"


def test_what_may_be_secret_is_shown_nowhere(tmp_path: Path) -> None:
    """A key of one of these kinds is hidden without anybody's further doing."""
    config, looked = Config(tmp_path), []
    chat = ChatRunner("x", base_url="http://h", model="m")
    for part in (config.database, config.nats, config.traces, config.hooks, chat):
        for entry in keys.entries(type(part)):
            if not entry.hidden or entry.key is None:
                continue
            changed = replace(part, **{entry.name: secret_value(entry.key, entry.name)})
            name = next((x.name for x in keys.entries(Config) if x.part is type(part)), "")
            new = {name: changed} if name else {"runners": {"x": changed}}
            shown = replace(config, **new)
            assert CANARY not in repr(shown), entry.name
            assert CANARY not in describe(shown), entry.name
            assert CANARY not in Masker(shown)(f"it said {CANARY}"), entry.name
            looked.append(entry.name)
    assert {"url", "lease_url", "endpoint", "on_end", "headers", "env", "api_key"} <= set(looked)


def test_a_variable_of_a_collectors_url_is_withheld(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each URL's password is one of the daemon's secrets."""
    monkeypatch.setenv("COLLECTOR", CANARY)
    file = tmp_path / "runctld.toml"
    file.write_text('[traces]\nendpoint = "https://me:${COLLECTOR}@h/v1/traces"\n')
    assert load(file).withheld == {"COLLECTOR"}
