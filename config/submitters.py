"""What whoever may submit decides in a runner's runs, and where that is too much."""

from __future__ import annotations

import os
from collections.abc import Iterator

from .prompts import interpreter, open_wrapper, reach, takes_prompt
from .prompts import warnings as prompt_warnings
from .schema import AcpRunner, CommandRunner, Config, PushRunner, Runner


def decided(runner: Runner) -> dict[str, bool]:
    """Whether submitters decide of its runs the "program", "arguments", "directory" and
    "environment", besides the prompt."""
    if not isinstance(runner, CommandRunner):
        return dict.fromkeys(("program", "arguments", "directory", "environment"), False)
    return {
        "program": (
            not runner.argv
            or takes_prompt(runner.argv[:1])
            or _found_there(runner)
            or (runner.args and open_wrapper(runner.argv))
        ),
        "arguments": not runner.argv or runner.args,
        "directory": runner.cwd == "submitter",
        "environment": False,  # but for the thread's name in RUNCTL_THREAD
    }


def takes_directory(runner: Runner) -> bool:
    """Whether its runs are in their submitters' directories. (A chat's are nowhere: what was
    submitted with it is kept as it is.)"""
    if isinstance(runner, PushRunner):
        return False
    return not isinstance(runner, CommandRunner) or runner.cwd == "submitter"


def _found_there(runner: CommandRunner) -> bool:
    """Whether its program is looked for in the submitter's directory."""
    if runner.cwd != "submitter" or not runner.argv:
        return False
    if "/" in runner.argv[0]:
        return not os.path.isabs(runner.argv[0])
    path = runner.env.get("PATH", os.environ.get("PATH", os.defpath))
    return not all(os.path.isabs(part) for part in path.split(os.pathsep))


def described(runner: Runner) -> str:
    """The same, and how a prompt comes, in words."""
    yes = [what for what, theirs in decided(runner).items() if theirs]
    no = [what for what, theirs in decided(runner).items() if not theirs]
    if not isinstance(runner, CommandRunner):
        how = "the prompt"
    elif isinstance(runner, AcpRunner):
        how = "the prompt (a message to the agent)"
    elif takes_prompt(runner.argv):
        how = "the prompt (an argument)"
    else:
        how = "the prompt (on stdin)"
    return f"submitters decide {', '.join([*yes, how])}; not {', '.join(no)}"


def warnings(config: Config, uid: int) -> Iterator[tuple[str, str, str]]:
    """(runner's name, what submitters decide there and should not, what to do about it).
    ``uid``: the daemon's user."""
    yield from prompt_warnings(config)
    for name, runner in config.runners.items():
        if not isinstance(runner, CommandRunner):
            continue
        if _found_there(runner) and runner.argv:
            yield (
                name,
                f"argv[0] is looked for in the submitter's directory: {runner.argv[0]}",
                "write its whole path, or name a directory in cwd",
            )
        # An agent's stdin is our bridge's.
        program = None if isinstance(runner, AcpRunner) else interpreter(runner.argv)
        if program is not None:
            yield (
                name,
                f"a prompt is run as code by {program}, which reads it from stdin",
                "name a program that reads text, or say that it is meant: leave out argv",
            )
        if runner.args and (said := reach(runner.argv)) is not None:
            yield (
                name,
                f"arguments that submitters add {said}",
                "leave out args, and have what they may choose in the prompt",
            )
        owner = uid if runner.account is None else runner.account.uid
        theirs = [what for what, yes in decided(runner).items() if yes]
        if owner == 0 and theirs:
            yield (
                name,
                f"its runs are root's, and submitters decide {', '.join(theirs)}",
                f"give it a user, {'set allow_shell = false, ' if name == 'shell' else ''}or run"
                " runctld as another user",
            )
