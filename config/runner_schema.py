"""What a runner may have, each key once; of the schema (``schema``)."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .keys import (
    Argv,
    Choice,
    Environment,
    FilePath,
    Flag,
    Number,
    Own,
    Seconds,
    Section,
    Size,
    Text,
    Url,
    Whole,
)


class Account(Section, frozen=True):
    """Whose a run is: ``uid``, ``gid`` and the supplementary ``groups``; ``home`` and
    ``shell`` are what the system's user database says."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"
    shell: str = "/bin/sh"


class Limits(Section, frozen=True):
    """Of each run of a runner, None for none: ``memory`` in bytes, ``processes`` with their
    threads, ``cpu`` in cores, ``files`` that one process may have open."""

    memory: Annotated[int | None, Size("Memory of each run.", least=1024**2)] = None
    processes: Annotated[
        int | None, Whole("Processes of each run, threads counted.", least=1, most=2**22)
    ] = None
    cpu: Annotated[
        float | None, Number("Cores of the processor for each run.", least=0.01, most=10_000.0)
    ] = None
    files: Annotated[int | None, Whole("Open files of each process.", least=8, most=2**30)] = None


#: What a resumed agent is told, by default: it may not have its task, and not know what it did.
RESUME_PROMPT = (
    "You were interrupted. A command may have run whose result you cannot see: check before you"
    " repeat it. Then finish: {prompt}"
)


class CommandRunner(Section, frozen=True):
    """A process. ``argv`` empty: given at submit time. "{prompt}" in an element is
    replaced by the prompt; without it the prompt goes to stdin. ``next_argv`` and
    ``resume_argv``, empty for none, go on with the thread's ``session``: "uuid", or "json:" and
    where it stands in a line of the command's output. ``args``: submitters may add
    arguments to ``argv``. ``cwd`` None: the home directory of whom the run is of. ``tty``: it
    runs on a terminal of its own. ``merge_output``: stdout and stderr are one pipe.
    ``leftovers``: whether what has left a run's session ends with it, or goes on until the
    daemon ends. ``stop_signal``: without its "SIG". ``on_interrupt``: what becomes of a run
    whose keeper or machine died under it. ``user`` and ``group``, names or numbers: whose its
    runs are, None for the daemon's; ``account`` is what the system says of them."""

    name: str
    kind: Annotated[Literal["command"], Choice('A command: `"command"`.', default="required")] = (
        "command"
    )
    argv: Annotated[
        tuple[str, ...],
        Argv(
            "The command; `{prompt}` is replaced by the prompt, which else goes to stdin.",
            default="given with each submit",
        ),
    ] = ()
    next_argv: Annotated[
        tuple[str, ...],
        Argv(
            "The command of later runs of a thread, once it has a session.",
            default="`resume_argv`, or else `argv`",
        ),
    ] = ()
    resume_argv: Annotated[
        tuple[str, ...],
        Argv(
            "The command of a run that was interrupted, once its thread has a session.",
            default="`next_argv`, or else the run starts over",
        ),
    ] = ()
    resume_prompt: Annotated[
        str,
        Text(
            "What that is told; `{prompt}` is replaced by the prompt.",
            default="that it was interrupted, and the prompt",
        ),
    ] = RESUME_PROMPT
    session: Annotated[
        str | None,
        Own(
            "Where `{session}` comes from: made by runctl, or read from the command's output.",
            form='`"uuid"`, or `{ json = "KEY.KEY" }`',
            default="no session",
        ),
    ] = None
    session_missing: Annotated[
        str | None,
        Text(
            "What the command says on stderr, and nothing on stdout, when it has no such session."
        ),
    ] = None
    args: Annotated[
        bool, Flag("Whether submitters may add arguments, and with them any option.")
    ] = False
    cwd: Annotated[
        Path | Literal["submitter"] | None,
        Own(
            "The working directory; `submitter` is where the run was submitted.",
            form='a path, or `"submitter"`',
            default='the home directory of `user`; without `argv`, `"submitter"`',
        ),
    ] = None
    user: Annotated[
        str | None,
        Own("Whose its runs are.", form="a name or a number", default="the daemon's user"),
    ] = None
    group: Annotated[
        str | None,
        Own("Their group.", form="a name or a number", default="the group of `user`"),
    ] = None
    limits: Limits = Limits()
    env: Annotated[
        dict[str, str],
        Environment(
            "Added to the environment.",
            taken=(
                *("RUNCTL_THREAD", "RUNCTL_RUN", "RUNCTL_ATTEMPT", "RUNCTL_SOCKET"),
                *("RUNCTL_RESUME", "RUNCTL_CHECKPOINT_FILE", "RUNCTL_PREVIOUS_OUTPUT"),
                "RUNCTL_SESSION",
            ),
        ),
    ] = msgspec.field(default_factory=dict)
    tty: Annotated[bool, Flag("Whether each run is on a terminal of its own.")] = False
    merge_output: Annotated[bool, Flag("Whether stdout and stderr are one pipe.")] = False
    leftovers: Annotated[
        Literal["end", "keep-until-daemon"],
        Choice("What becomes of processes that have left a run's session when it has ended."),
    ] = "end"
    stop_signal: Annotated[
        Literal["TERM", "INT", "HUP", "QUIT", "USR1", "USR2"],
        Choice("What a run is told to end with. In the middle of `stop_grace` it hears TERM."),
    ] = "TERM"
    on_interrupt: Annotated[
        Literal["continue", "restart", "fail"],
        Choice("An interrupted run goes on from its checkpoint, if any; starts over; or fails."),
    ] = "continue"
    account: Account | None = None


class ChatRunner(Section, frozen=True):
    """An OpenAI-compatible endpoint. ``timeout``: longest silence in seconds, before
    the first and between any two events. The key is ``api_key``, or the content of
    ``api_key_file``, read at each run so that it may be rotated.

    ``retry``: seconds from a turn's first failure in which it is tried again, as long as no
    text has come. ``history``: earlier messages that are sent along, two a turn, and at most
    ``history_bytes`` bytes of them, in whole turns.

    ``prefill``: how the endpoint is told to go on with a reply that was cut, None where it cannot.
    ``background``: the endpoint goes on with a response while nobody listens. With either, a turn
    that was interrupted can continue."""

    name: str
    base_url: Annotated[
        str,
        Url("The endpoint.", schemes=("http", "https"), example="http://127.0.0.1:8080/v1"),
    ]
    model: Annotated[str, Text("The model, as the endpoint calls it.", example="some-model")]
    kind: Annotated[Literal["chat"], Choice('A chat: `"chat"`.', default="required")] = "chat"
    api_key: Annotated[
        str | None, Text("The key of the endpoint.", secret=True, default="no key")
    ] = None
    api_key_file: Annotated[
        Path | None, FilePath("A file that holds it instead, read at each run.", holds="secret")
    ] = None
    system: Annotated[str | None, Text("The system prompt.", empty=True)] = None
    timeout: Annotated[float, Seconds("The longest silence of the endpoint.", least=0.001)] = 60.0
    retry: Annotated[float, Seconds("How long a turn is tried again, while no text has come.")] = (
        60.0
    )
    history: Annotated[
        int, Whole("Earlier messages of the thread that are sent along.", most=1_000_000)
    ] = 50
    history_bytes: Annotated[int, Size("How much text they may have.")] = 256 * 1024
    api: Annotated[
        Literal["chat", "responses"],
        Choice("What is asked of the endpoint: `/chat/completions`, or `/responses`."),
    ] = "chat"
    background: Annotated[
        bool, Flag("With `responses`: whether it goes on while nobody listens.")
    ] = False
    prefill: Annotated[
        Literal["vllm", "mistral", "deepseek", "llama.cpp"] | None,
        Choice(
            "With `chat`: how the endpoint is told to go on with the beginning of a reply.",
            default="it cannot",
        ),
    ] = None
    on_interrupt: Annotated[
        Literal["continue", "restart", "fail"],
        Choice(
            "A turn whose daemon, or machine, died under it goes on, starts over, or fails.",
            default='`"continue"` with `background` or `prefill`, else `"restart"`',
        ),
    ] = "restart"
    insecure: Annotated[bool, Flag("Whether `base_url` may be `http://` on another host.")] = False

    @property
    def can_continue(self) -> bool:
        return self.background or self.prefill is not None


class PushRunner(Section, frozen=True):
    """Work that is done elsewhere: its output is appended over HTTP, and there its end is told.
    ``idle_timeout`` seconds without an append end a run; 0: none does. ``content_type``: of a run
    that names none."""

    name: str
    kind: Annotated[
        Literal["push"],
        Choice(
            'Work that is done elsewhere, and appended over HTTP: `"push"`.', default="required"
        ),
    ] = "push"
    idle_timeout: Annotated[
        float,
        Seconds("A run ends as failed when nothing was appended for so long; 0: never."),
    ] = 3600.0
    content_type: Annotated[
        str, Text("Of what is appended to a run that was submitted without one.")
    ] = "text/plain"

    @property
    def on_interrupt(self) -> None:
        """Nothing of it is interrupted with a daemon."""


Runner = CommandRunner | ChatRunner | PushRunner
