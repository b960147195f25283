"""What a runner of kind ``acp`` may have; of the schema (``schema``)."""

from typing import Annotated, ClassVar, Literal

from .keys import Argv, Choice, Text
from .runner_schema import CommandRunner


class AcpRunner(CommandRunner, frozen=True):
    """A command that speaks the Agent Client Protocol, driven by a program of ours. Its prompt is
    a message, and its session is its own. ``mode``: None for the agent's default."""

    inapplicable: ClassVar[tuple[str, ...]] = (
        *("next_argv", "resume_argv", "session", "session_missing", "args"),
        *("tty", "merge_output", "stop_signal"),
    )

    kind: Annotated[
        Literal["acp"], Choice('An agent that speaks ACP: `"acp"`.', default="required")
    ] = "acp"  # type: ignore[assignment]
    argv: Annotated[
        tuple[str, ...], Argv("The agent, with what makes it speak ACP.", default="required")
    ] = ()
    resume_prompt: Annotated[
        str,
        Text(
            "What it is told after an interruption; `{prompt}` is replaced by the prompt.",
            default="that it was interrupted, and the prompt",
        ),
    ] = CommandRunner("").resume_prompt
    permissions: Annotated[
        Literal["allow", "deny"],
        Choice("What it is answered when it asks whether it may do something."),
    ] = "deny"
    mode: Annotated[
        str | None, Text("Of its session, as it calls that.", default="its own default")
    ] = None
    output: Annotated[
        Literal["text", "json"],
        Choice("Its text, with a line for each tool call; or all that it reports, as JSON lines."),
    ] = "text"
