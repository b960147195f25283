"""Configuration files: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runctl.config import files
from runctl.config import load as load_module
from runctl.config.describe import describe
from runctl.config.keys import names_of
from runctl.config.load import load
from runctl.config.read_keys import all_names
from runctl.config.schema import (
    ChatRunner,
    CommandRunner,
    Config,
    ConfigError,
    Database,
    Nats,
    Queue,
    Stream,
    Takeover,
)
from runctl.config.secrets import Masker, hide_secrets
from runctl.config.units import format_duration, format_size, parse_duration, parse_size

pytestmark = pytest.mark.short

EXAMPLE = Path(load_module.__file__).with_name("example.toml")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home directory of the test's own, no other configuration in sight."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("RUNCTL_CONFIG", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "POD_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(load_module, "SYSTEM_FILE", tmp_path / "etc" / "runctld.toml")
    return home


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "runctld.toml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def refusal(file: Path | None) -> str:
    """The one line with which ``file`` is refused."""
    with pytest.raises(ConfigError) as caught:
        load(file)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- where a configuration comes from ------------------------------------------------


def test_defaults_without_a_file(home):
    config = load(None)
    assert config == Config(
        state_dir=home / ".local/state/runctl",
        runners={"shell": CommandRunner("shell", cwd="submitter")},
    )


def test_an_empty_file_is_the_defaults(write, home):
    file = write("")
    assert load(file) == Config(
        state_dir=home / ".local/state/runctl",
        source=file,
        runners={"shell": CommandRunner("shell", cwd="submitter")},
    )


def test_state_dir_honours_xdg(monkeypatch, tmp_path, home):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert load(None).state_dir == tmp_path / "state/runctl"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert load(None).state_dir == home / ".local/state/runctl"


def test_search_order(write, monkeypatch, home):
    user = write("", "home/.config/runctl/runctld.toml")
    assert load(None).source == user
    xdg = write("", "xdg/runctl/runctld.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(xdg.parent.parent))
    assert load(None).source == xdg
    system = write("", "etc/runctld.toml")
    assert load(None).source == system
    named = write("", "named.toml")
    monkeypatch.setenv("RUNCTL_CONFIG", str(named))
    assert load(None).source == named
    given_file = write("", "given.toml")
    assert load(given_file).source == given_file


def test_an_empty_runctl_config_is_unset(monkeypatch):
    monkeypatch.setenv("RUNCTL_CONFIG", "")
    assert load(None).source is None


def test_a_named_file_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNCTL_CONFIG", str(tmp_path / "absent.toml"))
    assert f"{tmp_path}/absent.toml: no such file" in refusal(None)


def test_a_dangling_link_is_not_passed_over(tmp_path):
    link = tmp_path / "etc/runctld.toml"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "gone.toml")
    assert f"{link}: no such file" in refusal(None)


def test_a_directory(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: is a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(write):
    file = write("")
    file.chmod(stat.S_IWUSR)
    assert "cannot be read: Permission denied" in refusal(file)


def test_a_file_that_the_system_refuses(write, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    file = write("")
    monkeypatch.setattr(files, "open_at_once", refuse)
    assert "cannot be read: Permission denied" in refusal(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"executor_id = \xff", "is not UTF-8 text (byte 14)"),
        (b"executor_id =", "is not valid TOML: "),
        (b"a = 1\nb = = 2", "line 2"),
        (b"a = " + b"9" * 5000, "is not valid TOML"),
        (b"a = " + b"[" * 100_000, "is not valid TOML"),
    ],
)
def test_files_that_are_not_toml(write, content, words):
    file = write(content)
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    assert words in message


def test_a_byte_order_mark_is_accepted(write):
    assert load(write(b'\xef\xbb\xbfexecutor_id = "a"')).executor_id == "a"


# --- a whole file ---------------------------------------------------------------------


def test_every_key(write, monkeypatch, tmp_path):
    monkeypatch.setenv("KEY", "sesame")
    file = write("""
        executor_id = "box-1"
        environment = "production"
        state_dir = "state"
        start_timeout = 2.5
        allow_shell = false
        [database]
        url = "postgresql://me:pw@db:5432/runs"
        [nats]
        url = "tls://a:4222, tls://b:4222"
        credentials = "nats.creds"
        tls_ca = "/etc/ca.pem"
        tls_cert = "cert.pem"
        tls_key = "key.pem"
        tls_first = true
        inbox_prefix = "_INBOX.box-1"
        replicas = 3
        [stream]
        max_age = "7d"
        max_bytes = 2000000
        max_runs = 12
        sync = "always"
        [queue]
        max_running = 2
        max_attempts = 1
        stop_grace = 0
        outlive = 1.5
        [runners.agent]
        kind = "command"
        argv = ["agent", "{prompt}", "$$HOME"]
        cwd = "/srv"
        env = { TOKEN = "${KEY}", EMPTY = "" }
        tty = true
        [runners.gpt]
        kind = "chat"
        base_url = "https://llm.example/v1/"
        model = "m"
        api_key = "${KEY}"
        system = ""
        timeout = "90s"
        history = 0
        [runners.local]
        kind = "chat"
        base_url = "http://127.0.0.1:8080/v1"
        model = "m"
        api_key_file = "~/key"
    """)
    assert load(file) == Config(
        state_dir=tmp_path / "state",
        source=file,
        executor_id="box-1",
        environment="production",
        start_timeout=2.5,
        allow_shell=False,
        database=Database("postgresql://me:pw@db:5432/runs"),
        nats=Nats(
            "tls://a:4222,tls://b:4222",
            credentials=tmp_path / "nats.creds",
            tls_ca=Path("/etc/ca.pem"),
            tls_cert=tmp_path / "cert.pem",
            tls_key=tmp_path / "key.pem",
            tls_first=True,
            inbox_prefix="_INBOX.box-1",
            replicas=3,
        ),
        stream=Stream(7 * 86400.0, 2_000_000, "always", 12),
        queue=Queue(2, 1, 0.0, outlive=1.5),
        runners={
            "agent": CommandRunner(
                "agent",
                argv=("agent", "{prompt}", "$HOME"),
                cwd=Path("/srv"),
                env={"TOKEN": "sesame", "EMPTY": ""},
                tty=True,
            ),
            "gpt": ChatRunner(
                "gpt",
                base_url="https://llm.example/v1",
                model="m",
                api_key="sesame",
                system="",
                timeout=90.0,
                history=0,
            ),
            "local": ChatRunner(
                "local",
                base_url="http://127.0.0.1:8080/v1",
                model="m",
                api_key_file=tmp_path / "home/key",
            ),
        },
    )


def test_paths_start_at_the_files_directory(write, monkeypatch, tmp_path):
    write('state_dir = "here"', "sub/runctld.toml")
    monkeypatch.chdir(tmp_path)
    assert load(Path("sub/runctld.toml")).state_dir == tmp_path / "sub/here"


def test_the_example_is_the_defaults(home):
    config, defaults = load(EXAMPLE), load(None)
    assert config.source == EXAMPLE
    assert describe(config).split("\n", 1)[1] == describe(defaults).split("\n", 1)[1]


def test_the_example_with_everything_uncommented(write, monkeypatch):
    """Every key of the schema is in the example, and its samples are valid."""
    monkeypatch.setenv("POD_NAME", "runctl-0")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    lines = []
    for line in EXAMPLE.read_text().splitlines():
        sample = line.lstrip("#")
        is_sample = line.startswith("#") and sample[:1] not in ("", " ")
        lines.append(sample if is_sample else line)
    text = "\n".join(lines).replace('executor_id = "box-1"', "", 1)
    text = text.replace('api_key = "${OPENAI_API_KEY}"', "", 1)
    text = text.replace('url = "embedded"', 'url = "nats://localhost"')
    config = load(write(text))
    assert config.executor_id == "runctl-0"
    assert isinstance(config.runners["agent"], CommandRunner)
    assert isinstance(config.runners["chat"], ChatRunner)
    for name in all_names():
        assert f"{name.split('.')[-1]} = " in EXAMPLE.read_text() or name in (
            *names_of(Config),
            "runners",
        )


# --- variables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("${POD_NAME}", "runctl-0"),
        ("a-${POD_NAME}-b-${POD_NAME}", "a-runctl-0-b-runctl-0"),
        ("$${POD_NAME}", "${POD_NAME}"),
        ("$$${POD_NAME}", "$runctl-0"),
        ("$POD_NAME costs 5$", "$POD_NAME costs 5$"),
    ],
)
def test_expansion(write, monkeypatch, written, read):
    monkeypatch.setenv("POD_NAME", "runctl-0")
    assert load(write(f'executor_id = "{written}"')).executor_id == read


def test_a_value_is_expanded_once(write, monkeypatch):
    monkeypatch.setenv("POD_NAME", "${POD_NAME}$$")
    assert load(write('executor_id = "${POD_NAME}"')).executor_id == "${POD_NAME}$$"


@pytest.mark.parametrize("written", ["${", "${}", "${1A}", "${A B}", "${A", "${A{B}}"])
def test_malformed_variables(write, written):
    message = refusal(write(f"executor_id = '{written}'"))
    assert "executor_id: malformed variable" in message


def test_an_unset_variable_names_key_file_variable_and_fix(write, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = write("""
        [runners.gpt]
        kind = "chat"
        base_url = "https://llm.example"
        model = "m"
        api_key = "${OPENAI_API_KEY}"
    """)
    assert refusal(file) == (
        f"{file}: runners.gpt.api_key: the environment variable OPENAI_API_KEY is not set: "
        "set it where runctld is started"
    )


def test_a_variable_that_is_not_text(write, monkeypatch):
    monkeypatch.setenv("ODD", os.fsdecode(b"\xff"))
    assert "variable ODD is not UTF-8" in refusal(write('executor_id = "${ODD}"'))


# --- the executor ID ------------------------------------------------------------------

PRODUCTION = 'environment = "production"\n'
POSTGRESQL = '[database]\nurl = "postgresql://db/runs"\n'


@pytest.mark.parametrize("rest", ["", PRODUCTION, POSTGRESQL, PRODUCTION + POSTGRESQL])
@pytest.mark.parametrize("value", ['""', '"  "', '"${POD_NAME}"', '"${EMPTY}"'])
def test_an_empty_or_unset_executor_id_is_refused_everywhere(write, monkeypatch, rest, value):
    monkeypatch.setenv("EMPTY", "")
    file = write(f"executor_id = {value}\n{rest}")
    message = refusal(file)
    assert message.startswith(f"{file}: executor_id: ")
    assert all(word in message for word in ("POD_NAME", "downward API", "StatefulSet", "constant"))
    if value == '"${EMPTY}"':
        assert "EMPTY" in message


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (PRODUCTION, 'environment = "production" needs it'),
        (POSTGRESQL, "a PostgreSQL database needs it"),
    ],
)
def test_a_missing_executor_id_where_it_is_needed(write, rest, reason):
    file = write(rest)
    message = refusal(file)
    assert message.startswith(f"{file}: executor_id: is missing and {reason}: ")
    assert all(word in message for word in ("POD_NAME", "downward API", "StatefulSet", "constant"))


@pytest.mark.parametrize("rest", [PRODUCTION, POSTGRESQL])
def test_an_executor_id_satisfies_both(write, rest):
    assert load(write(f'executor_id = "box-1"\n{rest}')).executor_id == "box-1"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('"a\\nb"', "cannot be printed"),
        ('"a\\u001b"', "cannot be printed"),
        (f'"{"x" * 129}"', "at most 128 bytes, got 129"),
        (f'"{"ü" * 65}"', "at most 128 bytes, got 130"),
        ("7", "expected a string, got the number 7"),
    ],
)
def test_bad_executor_ids(write, value, words):
    assert words in refusal(write(f"executor_id = {value}"))


def test_an_executor_id_of_128_bytes(write):
    assert load(write(f'executor_id = "{"ü" * 64}"')).executor_id == "ü" * 64


# --- what is refused, and how ---------------------------------------------------------

CHAT = '[runners.gpt]\nkind = "chat"\nbase_url = "http://h"\nmodel = "m"\n'
COMMAND = '[runners.x]\nkind = "command"\n'


SERVER = "[nats]\nurl = 'nats://h'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys
        ("[stream]\nmax_agee = 1", "stream.max_agee: unknown key: did you mean stream.max_age?"),
        ("enviroment = 1", "enviroment: unknown key: did you mean environment?"),
        ("max_age = 1", "max_age: unknown key: did you mean stream.max_age or history.max_age?"),
        ("source = 1", "source: unknown key: remove it, or use one of state_dir, "),
        ("[qqq]", "qqq: unknown key: remove it"),
        ('"a b" = 1', '"a b": unknown key'),
        ('"a\\nb" = 1', '"a\\nb": unknown key'),
        (COMMAND + "argvv = []", "runners.x.argvv: unknown key: did you mean runners.x.argv?"),
        (COMMAND + "model = 'm'", "runners.x.model: unknown key: did you mean runners.NAME.model?"),
        (COMMAND + "name = 'm'", "runners.x.name: unknown key"),
        # wrong types
        ("state_dir = 1", "state_dir: expected a string, got the number 1"),
        ("state_dir = ''", "state_dir: is empty"),
        ("state_dir = '~nobody-of-this-name/x'", "state_dir: no home directory"),
        ('state_dir = "a\\u0000b"', "state_dir: holds a NUL character"),
        ("allow_shell = 1", "allow_shell: expected true or false, got the number 1"),
        ("allow_shell = 'true'", "allow_shell: expected true or false, got a string"),
        ("stream = 1", "stream: expected a table, got the number 1"),
        ("runners = []", "runners: expected a table, got an array"),
        ("[runners]\nx = 1", "runners.x: expected a table, got the number 1"),
        ("[[runners.x]]\nkind = 'command'", "runners.x: expected a table, got an array"),
        ("[queue]\nmax_running = true", "queue.max_running: expected a whole number, got true"),
        ("[queue]\nmax_running = 1.0", "queue.max_running: expected a whole number, got the num"),
        ("[queue]\nmax_running = '1'", "queue.max_running: expected a whole number, got a string"),
        ("[queue]\nmax_running = 0", "queue.max_running: expected at least 1, got 0"),
        ("[queue]\nmax_attempts = -1", "queue.max_attempts: expected at least 1, got -1"),
        (f"[queue]\nmax_attempts = {'9' * 4000}", "queue.max_attempts: expected at most 1000000"),
        ("[queue]\nmax_running = 1979-05-27", "queue.max_running: expected a whole number, got a "),
        # durations and sizes
        ("[queue]\nstop_grace = true", 'queue.stop_grace: expected a duration such as "500ms"'),
        ("[queue]\nstop_grace = '5 x'", ' or a number of seconds, got "5 x"'),
        ("[queue]\nstop_grace = -1", "queue.stop_grace: expected at least 0s, got -1"),
        ("[queue]\nstop_grace = '-1s'", "queue.stop_grace: expected a duration"),
        ("[queue]\nstop_grace = inf", "queue.stop_grace: expected a duration"),
        ("[queue]\nstop_grace = nan", "queue.stop_grace: expected a duration"),
        ("start_timeout = 0", "start_timeout: expected at least 1ms, got 0s"),
        ("[stream]\nmax_age = '500ms'", "stream.max_age: expected at least 1s, got 500ms"),
        ("[stream]\nmax_age = '40000d'", "stream.max_age: expected at most 36500d"),
        ("[stream]\nmax_bytes = 1.5", 'stream.max_bytes: expected a size such as "4GiB"'),
        ("[stream]\nmax_bytes = '4XB'", 'stream.max_bytes: expected a size such as "4GiB"'),
        ("[stream]\nmax_bytes = '1.0001kB'", "stream.max_bytes: expected a whole number of bytes"),
        ("[stream]\nmax_bytes = 1", "stream.max_bytes: expected at least 1MiB, got 1B"),
        ("[stream]\nmax_bytes = '9999999TiB'", "stream.max_bytes: expected at most "),
        # choices
        ("environment = 'prod'", 'environment: expected "development" or "production", got "prod"'),
        ("environment = ''", 'environment: expected "development" or "production", got ""'),
        ("[stream]\nmax_runs = -1", "stream.max_runs: expected at least 0, got -1"),
        ("[stream]\nmax_runs = '5'", "stream.max_runs: expected a whole number, got a string"),
        ("[stream]\nsync = 'never'", 'stream.sync: expected "default" or "always", got "never"'),
        ("[runners.x]", 'runners.x.kind: is missing: set it to "command" or "acp" or "chat"'),
        (
            "[runners.x]\nkind = 'shell'",
            'runners.x.kind: expected "command" or "acp" or "chat" or "push", got "shell',
        ),
        ("[runners.x]\nkind = 1", "runners.x.kind: expected a string, got the number 1"),
        # runners
        ("[runners.'a b']\nkind = 'command'", 'runners."a b": a runner\'s name is 1 to 64'),
        ("[runners.'']\nkind = 'command'", 'runners."": a runner\'s name is 1 to 64'),
        (f"[runners.{'x' * 65}]", "a runner's name is 1 to 64"),
        ("[runners.'ü']\nkind = 'command'", "a runner's name is 1 to 64"),
        ("allow_shell = false\n[runners.shell]\nkind = 'command'", "runners.shell: allow_shell = "),
        (COMMAND + "argv = 'ls'", "runners.x.argv: expected a list of strings, got a string"),
        (COMMAND + "argv = ['ls', 1]", "runners.x.argv[1]: expected a string, got the number 1"),
        (COMMAND + "argv = ['ls', '']", "runners.x.argv[1]: is empty"),
        (COMMAND + "env = []", "runners.x.env: expected a table, got an array"),
        (COMMAND + "env = {A = 1}", "runners.x.env.A: expected a string, got the number 1"),
        (COMMAND + "env = {'A=B' = ''}", 'runners.x.env."A=B": an environment variable'),
        (COMMAND + "env = {'' = ''}", 'runners.x.env."": an environment variable'),
        (COMMAND + "env = {RUNCTL_RUN = ''}", "runners.x.env.RUNCTL_RUN: is set by runctld"),
        (COMMAND + "tty = 1", "runners.x.tty: expected true or false, got the number 1"),
        (CHAT + "tty = true", 'runners.gpt.tty: is for kind = "command" only: remove it'),
        (CHAT + "cwd = '/'", 'runners.gpt.cwd: is for kind = "command" only: remove it'),
        ("[runners.x]\nkind = 'chat'", "runners.x.base_url: is missing: add base_url = "),
        (CHAT.replace('model = "m"', ""), "runners.gpt.model: is missing: add model = "),
        (CHAT.replace("http://h", "h:80"), "runners.gpt.base_url: expected http:// or https://"),
        (CHAT.replace("http://h", "http://"), "runners.gpt.base_url: names no host"),
        (CHAT + "api_key = ''", "runners.gpt.api_key: is empty"),
        (CHAT + "api_key = 'a'\napi_key_file = 'b'", "runners.gpt.api_key: runners.gpt.api_key_fi"),
        (CHAT + "timeout = 0", "runners.gpt.timeout: expected at least 1ms"),
        (CHAT + "history = -1", "runners.gpt.history: expected at least 0"),
        (CHAT + "history_bytes = -1", "runners.gpt.history_bytes: expected at least 0"),
        (CHAT + 'history_bytes = "many"', "runners.gpt.history_bytes: "),
        (CHAT + 'retry = "soon"', "runners.gpt.retry: "),
        # servers
        (
            "[database]\nurl = 'mysql://h'",
            'database.url: expected "sqlite" or postgresql://, got ',
        ),
        ("[database]\nurl = 'sqlite:///f'", 'database.url: expected "sqlite" or postgresql://, '),
        ("[database]\nurl = 'postgresql://h:x/d'", "database.url: is not a valid URL"),
        ("[database]\nurl = ''", "database.url: is empty"),
        ("[nats]\nurl = 'localhost'", 'nats.url: expected "embedded" or nats:// or tls:// or ws:/'),
        ("[nats]\nurl = 'nats://a,'", "nats.url: expected "),
        ("[nats]\nurl = 'nats://a b'", "nats.url: is not a valid URL"),
        ("[nats]\nurl = 'nats://[a'", "nats.url: is not a valid URL"),
        ("[nats]\nurl = 'nats://:4222'", "nats.url: names no host"),
        ("[nats]\nurl = 'nats://a,wss://b'", "nats.url: mixes WebSocket and plain URLs"),
        ("[nats]\nurl = 'nats://a'\nreplicas = 6", "nats.replicas: expected at most 5"),
        ("[nats]\nreplicas = 3", "nats.replicas: the embedded server is one server"),
        ("[nats]\ncredentials = 'f'", "nats.credentials: needs a server"),
        ("[nats]\ntls_ca = 'f'", "nats.tls_ca: needs a server"),
        (f"{SERVER}credentials = 'f'\nnkey = 'f'", "nats.nkey: nats.credentials is set too"),
        ("[nats]\nurl = 'nats://u@h'\nnkey = 'f'", "nats.nkey: nats.url holds a user too"),
        (f"{SERVER}tls_cert = 'f'", "nats.tls_cert: needs nats.tls_key"),
        (f"{SERVER}tls_key = 'f'", "nats.tls_key: needs nats.tls_cert"),
        (f"{SERVER}tls_first = 1", "nats.tls_first: expected true or false"),
        (f"{SERVER}inbox_prefix = '_INBOX.>'", "nats.inbox_prefix: expected a subject without"),
        ("[nats]\nurl = 'ws://h'\ntls_ca = 'f'", "nats.tls_ca: nats.url has ws://"),
        ("[nats]\nurl = 'wss://h'\ntls_first = true", "nats.tls_first: wss:// has TLS first"),
        (f"{SERVER}context = 'c'", "nats.url: comes from nats.context"),
        ("[nats]\ncontext = 'c'\nnkey = 'f'", "nats.nkey: comes from nats.context"),
        ("[nats]\ncontext = '..'", "nats.context: expected a context's name"),
        ("[nats]\ncontext = 'none'", "nats.context: "),
        ("[nats]\ncontext = './none'", "none: no such file"),
        ("[nats]\nlogin = 'x'", "nats.login: unknown key"),
    ],
)
def test_refusals(write, text, message):
    file = write(text)
    got = refusal(file)
    assert got.startswith(f"{file}: ")
    assert message in got


@pytest.mark.parametrize(
    "text",
    [
        "[database]\nurl = 'mysql://me:sesame@h'",
        "[database]\nurl = 'me:sesame@h'",
        "[database]\nurl = 'postgresql://me:sesame@h:port/d'",
        "[database]\nurl = 'postgresql://me:ses ame@h/d'",
        "[nats]\nurl = 'nats//sesame@h'",
        CHAT + "api_key = ['sesame']",
        CHAT + "api_key = 'sesame'\napi_key_file = 'b'",
        CHAT + 'api_key = "sesame\\u0000"',
        COMMAND + "env = {TOKEN = ['sesame']}",
    ],
)
def test_refusals_hold_no_secret(write, text):
    message = refusal(write(text))
    assert "sesame" not in message
    assert "ses ame" not in message


# --- runners --------------------------------------------------------------------------


def test_shell_can_be_forbidden_or_defined(write):
    assert load(write("allow_shell = false")).runners == {}
    own = load(write('[runners.shell]\nkind = "command"\nargv = ["sh", "-c", "{prompt}"]'))
    assert own.runners == {"shell": CommandRunner("shell", argv=("sh", "-c", "{prompt}"))}


def test_an_api_key_is_not_in_the_repr(write):
    config = load(write(CHAT + 'api_key = "sesame"'))
    assert "sesame" not in repr(config)


def test_a_client_needs_neither_keys_nor_pod_name(write):
    text = PRODUCTION + 'executor_id = "${POD_NAME}"\n' + CHAT + 'api_key = "${ABSENT_KEY}"'
    config = load(write(text), client=True)
    assert (config.executor_id, config.runners) == (None, {})
    assert load(write('executor_id = "box-1"'), client=True).executor_id == "box-1"


def test_a_client_is_told_of_other_errors(write):
    with pytest.raises(ConfigError, match="unknown key"):
        load(write("natss = 1"), client=True)


@pytest.mark.parametrize("url", ["postgresql:///runs?host=/run/pg", "postgresql://h/d"])
def test_postgresql_urls(write, url):
    config = load(write(f'executor_id = "a"\n[database]\nurl = "{url}"'))
    assert config.database == Database(url)
    assert not config.database.embedded


# --- the effective configuration --------------------------------------------------------


def test_describe_hides_secrets(write, monkeypatch):
    monkeypatch.setenv("PASSWORD", "sesame")
    config = load(
        write(
            """
            executor_id = "box-1"
            [database]
            url = "postgresql://me:${PASSWORD}@db/runs?sslpassword=${PASSWORD}"
            [nats]
            url = "nats://me:${PASSWORD}@a:4222,nats://${PASSWORD}@b"
            """
            + CHAT.replace("http://h", "http://me:${PASSWORD}@h")
            + 'api_key = "${PASSWORD}"\n'
            + COMMAND
            + 'env = { TOKEN = "${PASSWORD}" }'
        )
    )
    text = describe(config)
    assert "sesame" not in text
    shown = tomli.loads(text)
    assert shown["database"]["url"] == "postgresql://me:***@db/runs?sslpassword=***"
    assert shown["nats"]["url"] == "nats://me:***@a:4222,nats://***@b"
    assert shown["runners"]["gpt"]["api_key"] == "***"
    assert shown["runners"]["gpt"]["base_url"] == "http://me:***@h"
    assert shown["runners"]["x"]["env"] == {"TOKEN": "***"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite", "sqlite"),
        ("nats://h:4222", "nats://h:4222"),
        ("postgresql://me@h/d", "postgresql://me@h/d"),
        ("postgresql://me:a/b@c@h/d", "postgresql://me:***@h/d"),
        ("postgresql://h/d?user=a&password=b#c", "postgresql://h/d?user=a&password=***#c"),
    ],
)
def test_hide_secrets(url, shown):
    assert hide_secrets(url) == shown


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
visible = words.filter(str.strip)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=50,
)
@given(
    argv=st.lists(words),
    system=st.none() | words,
    model=visible,
    seconds=st.floats(1, 1e9),
    size=st.integers(2**20, 2**62),
)
def test_described_configuration_loads_as_itself(tmp_path, argv, system, model, seconds, size):
    file = tmp_path / "again.toml"
    config = Config(
        state_dir=tmp_path / "state",
        source=file,
        executor_id="box-1",
        start_timeout=seconds,
        queue=Queue(outlive=min(seconds, 30.0)),
        stream=Stream(max_age=seconds, max_bytes=size, max_runs=size % 1000),
        runners={
            "shell": CommandRunner(
                "shell", argv=tuple(argv), tty=bool(argv), cwd=None if argv else "submitter"
            ),
            "gpt": ChatRunner(
                "gpt", base_url="http://h", model=model, system=system, timeout=seconds
            ),
        },
    )
    file.write_text(describe(config), encoding="utf-8", newline="")
    assert load(file) == config


# --- units ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("5s", 5),
        ("2m", 120),
        ("24h", 86400),
        ("7d", 604800),
        ("1.5h", 5400),
        ("90", 90),
        ("0.25", 0.25),
        (" 5 s ", 5),
        ("0s", 0),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-5s", "5S", "5M", "1h30m", "1e3", "inf", "٥s", ".5s"])
def test_bad_durations(text):
    with pytest.raises(ValueError, match="expected a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 1024**3), ("512MB", 512_000_000), ("100", 100), ("1.5KiB", 1536), ("1kb", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4G", "-1", "0x10", "1.5", "1e3", "9" * 60])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="expected a "):
        parse_size(text)


@given(st.floats(0, 1e12))
def test_durations_survive_formatting(seconds):
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 2**62))
def test_sizes_survive_formatting(size):
    assert parse_size(format_size(size)) == size


@given(st.text())
def test_any_text_is_parsed_or_refused(text):
    for parse in (parse_duration, parse_size):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.5, "500ms"), (90, "90s"), (120, "2m"), (86400, "1d")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (100, "100B"), (4 * 1024**3, "4GiB"), (512_000_000, "512MB")]
)
def test_format_size(size, text):
    assert format_size(size) == text


# --- takeover -----------------------------------------------------------------------

SHARED = 'executor_id = "a"\n[database]\nurl = "postgresql://h/d"\n[nats]\nurl = "nats://h"\n'


def test_takeover(write):
    assert load(write("")).takeover == Takeover()
    file = write(SHARED + '[takeover]\nenabled = true\ngroup = "eu"\nafter = "10s"\n')
    config = load(file)
    assert config.takeover == Takeover(True, "eu", 10.0)
    assert load(write(describe(config), "again.toml")).takeover == config.takeover


@pytest.mark.parametrize(
    ("text", "grace"),
    [
        ("", 60.0),
        ("[queue]\nlease_grace = '90s'\n", 90.0),
        ("[queue]\nlease_grace = 0\n", 0.0),
        ("[takeover]\nafter = '3s'\n", 60.0),
        ("[takeover]\nenabled = true\n", 2.0),
        ("[takeover]\nenabled = true\nafter = '2s'\n", 1.0),
        ("[takeover]\nenabled = true\nafter = '31s'\n", 30.0),
        ("[takeover]\nenabled = true\nafter = '10m'\n", 60.0),
        ("[takeover]\nenabled = true\nafter = '10m'\n[queue]\nlease_grace = '599s'\n", 599.0),
    ],
)
def test_the_grace_of_a_lease_is_below_what_peers_wait(write, text, grace):
    config = load(write(SHARED + text))
    assert config.queue.lease_grace == grace
    assert load(write(describe(config), "again.toml")).queue == config.queue


@pytest.mark.parametrize(
    ("text", "outlive"),
    [
        ("", 30.0),
        ("start_timeout = '10m'\n", 30.0),
        ("start_timeout = '5s'\n", 5.0),
        ("[queue]\noutlive = 0\n", 0.0),
        ("start_timeout = '10m'\n[queue]\noutlive = '10m'\n", 600.0),
    ],
)
def test_a_start_waits_as_long_as_runs_go_on_without_a_daemon(write, text, outlive):
    config = load(write(text))
    assert config.queue.outlive == outlive
    assert load(write(describe(config), "again.toml")).queue == config.queue
    assert refusal(write("[queue]\noutlive = '31s'\n")).endswith(
        "queue.outlive: a start waits no longer than start_timeout = 30s for what it cannot take"
        " over: lower it, or raise start_timeout to 31s"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[takeover]\nenabled = true\n", "takeover.enabled: needs executors that share a Post"),
        (
            SHARED.replace("nats://h", "embedded") + "[takeover]\nenabled = true\n",
            "takeover.enabled: needs executors that share a NATS",
        ),
        (SHARED + '[takeover]\nafter = "1s"\n', "takeover.after: expected at least 2s"),
        (SHARED + "[takeover]\ngroups = 1\n", "did you mean takeover.group?"),
        (
            SHARED + "[takeover]\nenabled = true\n[queue]\nlease_grace = '2001ms'\n",
            "queue.lease_grace: peers take over after 3s: with takeover at most 2s; lower it, or"
            " raise takeover.after to 3001ms",
        ),
        ("[queue]\nlease_grace = '-1s'\n", "queue.lease_grace: expected"),
    ],
)
def test_takeover_that_cannot_be(write, text, words):
    assert words in refusal(write(text))


# --- as a service of systemd ------------------------------------------------------------


def test_the_state_directory_that_systemd_made(monkeypatch, home):
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/runctl/a:/var/lib/other")
    assert load(None).state_dir == Path("/var/lib/runctl/a")
    assert load(None, client=True).state_dir == home / ".local/state/runctl"


def test_a_url_of_the_lease(write, monkeypatch, tmp_path):
    monkeypatch.setenv("PASSWORD", "sesame")
    monkeypatch.setenv("LEASE_PASSWORD", "open-barley")
    text = (
        'executor_id = "a"\n[database]\nurl = "postgresql://me:${PASSWORD}@pool/runs"\n'
        'lease_url = "postgresql://me:${LEASE_PASSWORD}@db/runs"'
    )
    config = load(write(text))
    assert config.database.lease_url == "postgresql://me:open-barley@db/runs"
    assert {"PASSWORD", "LEASE_PASSWORD"} <= config.withheld
    shown = tomli.loads(describe(config))["database"]
    assert shown["lease_url"] == "postgresql://me:***@db/runs"
    assert Masker(config)("x open-barley y") == "x *** y"
    (tmp_path / "db").write_text("postgresql://me:open-barley@db/runs\n")
    config = load(write(f'executor_id = "a"\n[database]\nurl = "{URL}"\nlease_url_file = "db"'))
    assert config.database.lease_url == "postgresql://me:open-barley@db/runs"
    assert "barley" not in describe(config)
    assert load(write(describe(config))).database == config.database
    assert "lease_url" not in describe(load(write(f'executor_id = "a"\n[database]\nurl="{URL}"')))


URL = "postgresql://db/runs"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (f'lease_url = "{URL}"', "database.lease_url: is for a PostgreSQL: set database.url"),
        ('lease_url_file = "db"', "database.lease_url_file: is for a PostgreSQL: set database"),
        (f'url = "{URL}"\nlease_url = "sqlite"', "database.lease_url: expected postgresql://"),
        (f'url = "{URL}"\nlease_url = ""', "database.lease_url: is empty"),
        (f'url = "{URL}"\nlease_url_file = "no"', "database.lease_url_file: "),
        (
            f'url = "{URL}"\nlease_url = "{URL}"\nlease_url_file = "db"',
            "database.lease_url: database.lease_url_file is set too: remove one",
        ),
    ],
)
def test_a_url_of_the_lease_that_cannot_be_used(write, tmp_path, more, problem):
    (tmp_path / "db").write_text(URL)
    with pytest.raises(ConfigError) as caught:
        load(write(f'executor_id = "a"\n[database]\n{more}'))
    assert problem in str(caught.value)


def test_a_database_url_in_a_credential(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "db").write_text("postgresql://me:sesame@db/runs\n")
    file = write('executor_id = "a"\n[database]\nurl_file = "${CREDENTIALS_DIRECTORY}/db"')
    config = load(file)
    assert config.database.url == "postgresql://me:sesame@db/runs"
    assert "sesame" not in describe(config)
    assert load(write(describe(config))).database == config.database


@pytest.mark.parametrize(
    ("content", "more", "problem"),
    [
        (None, "", "db cannot be read (No such file or directory): correct the path or its mode"),
        ("\n", "", "db is empty: write the URL to it"),
        ("\xff", "", "db is not UTF-8 text: write it anew"),
        ("mysql://sesame", "", "postgresql://"),
        ("sqlite", '\nurl = "sqlite"', "database.url: database.url_file is set too: remove one"),
    ],
)
def test_a_database_url_file_that_cannot_be_used(write, tmp_path, content, more, problem):
    if content is not None:
        (tmp_path / "db").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        load(write(f'executor_id = "a"\n[database]\nurl_file = "db"{more}'))
    assert problem in str(caught.value)
    assert "database.url" in str(caught.value)
    assert "sesame" not in str(caught.value)
