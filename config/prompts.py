"""What a submitter may give to a command: where a prompt stands in its argv, and what it
could become there.

A prompt is a text of somebody else's. In an argument of its own a program takes one that
begins with a dash for an option (``--settings=...``, ``--version``), unless a ``--`` stands
before it: "Guideline 10" of
https://pubs.opengroup.org/onlinepubs/9799919799/basedefs/V1_chap12.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from .schema import AcpRunner, CommandRunner, Config

PROMPT, SESSION, THREAD, RUN = "{prompt}", "{session}", "{thread}", "{run}"
#: What a runner's argv should hold instead.
SAFE = 'write "--", "{prompt}" or "--NAME={prompt}", or leave {prompt} out: it then goes to stdin'

#: The prompt behind one of these is an option's name, or the rest of it.
_NAME = re.compile(r"-|--[A-Za-z0-9_-]*")
#: Programs that run an argument as code, and after which options.
_INTERPRETERS = tuple(
    (re.compile(program), re.compile(option))
    for program, option in (
        ("(ba|da|z|k|mk|a|fi)?sh|busybox|su|runuser", "-[A-Za-z]*c|--command"),
        ("(python|pypy)[0-9.]*", "-[A-Za-z]*c"),
        ("perl|ruby|node|nodejs|bun|php|lua", "-[A-Za-z]*[eEpr]|--eval|--print"),
        ("deno", "eval"),
    )
)


#: Options of them that a program's name follows, or that run nothing.
_RUNS = ("-c", "-m", "-e", "--version", "-V", "--help")


def takes_prompt(argv: Sequence[str]) -> bool:
    """Whether the prompt goes into ``argv``, rather than to stdin."""
    return any(PROMPT in part for part in argv)


def interpreter(argv: Sequence[str]) -> str | None:
    """The program of ``argv`` that takes what is on its stdin for code, if there is one: a
    shell or the like, without a script or anything to run."""
    if takes_prompt(argv):
        return None
    for index, part in enumerate(argv):
        name = PurePath(part).name
        known = any(program.fullmatch(name) for program, _ in _INTERPRETERS[:-1])
        if known and all(x.startswith("-") and x not in _RUNS for x in argv[index + 1 :]):
            return name
    return None


#: Programs that run the program which their operands name.
_WRAPPERS = re.compile(
    "doas|env|ionice|nice|nohup|runuser|setpriv|setsid|stdbuf|strace|sudo|systemd-run|taskset|time"
    "|timeout|unshare|watch|xargs"
)
#: Programs with options that run others, or that name files to write.
_MIGHTY = re.compile(
    "git|hg|ssh|scp|rsync|find|tar|zip|sed|[gm]?awk|make|sort|curl|wget|docker|podman|kubectl"
    "|nix|npx|uvx|chroot|flock|parallel|script|cp|mv|ln|dd|tee|install|vim?|emacs"
)


def reach(argv: Sequence[str]) -> str | None:
    """What arguments that are added to ``argv`` can do beyond what its program is for, in
    words; None when its names say nothing of the kind."""
    if not argv:
        return None
    name = PurePath(argv[0]).name
    if open_wrapper(argv):
        return f"choose the program that {name} runs"
    if interpreter(argv) == name or _takes_code(argv):
        return f"are code for {name}, or name a file of it"
    if _MIGHTY.fullmatch(name):
        return f"may be options by which {name} runs programs or writes files"
    return None


def _takes_code(argv: Sequence[str]) -> bool:
    """Whether what is added to ``argv`` is code at once, such as ["bash", "-c"]."""
    name = PurePath(argv[0]).name
    return any(p.fullmatch(name) and o.fullmatch(argv[-1]) for p, o in _INTERPRETERS)


def open_wrapper(argv: Sequence[str]) -> bool:
    """Whether ``argv`` runs the program that is named behind it, such as ["sudo", "--"]: but for
    options, their values as far as they show, numbers and assignments it has no arguments."""
    if not argv or not _WRAPPERS.fullmatch(PurePath(argv[0]).name):
        return False
    rest = argv[1:]
    if rest and rest[-1] == "--":
        return True
    return all(
        part[:1] == "-" or part[:1].isdigit() or "=" in part or before in ("-u", "-g")
        for before, part in zip(("", *rest), rest, strict=False)
    )


def refusal(runner: CommandRunner, prompt: str | None, args: Sequence[str]) -> str | None:
    """Why ``runner`` is not given ``prompt`` and the arguments ``args``, both a submitter's, in
    one line; None if it is."""
    name = runner.name
    if not runner.argv and not args:
        return f"runner {name!r} needs a command: runctl submit THREAD -- COMMAND ARG..."
    if runner.argv and args and not runner.args:
        return (
            f"runner {name!r} takes no arguments: submit a prompt, or set args = true for it"
            " where every submitter may use every option of its command"
        )
    if isinstance(runner, AcpRunner) and not (prompt or "").strip():
        return f"runner {name!r} needs a prompt: runctl submit THREAD --runner {name} PROMPT"
    for key, argv in commands(runner):
        if not takes_prompt(argv):
            continue
        if prompt is None:
            return f"runner {name!r} needs a prompt: runctl submit THREAD --runner {name} PROMPT"
        if not prompt.strip():
            return f"the prompt is empty, and runner {name!r} passes it as an argument: write one"
        for index, lead in _leads(argv):
            if lead:
                return (
                    f"{key}[{index}] of runner {name!r} makes an option's name of the prompt;"
                    f" change it: {SAFE}"
                )
            if prompt.startswith("-"):
                return (
                    'the prompt begins with "-", which the command would take for an option:'
                    f' begin it with something else, or have "--", "{PROMPT}" in the {key} of'
                    f" runner {name!r}"
                )
    return None


def thread_refusal(runner: CommandRunner, thread: str) -> str | None:
    """Why ``runner`` is not given the name of ``thread``, in one line; None if it is."""
    if not thread.startswith("-"):
        return None
    for key, argv in commands(runner):
        if any(not lead for _, lead in _leads(argv, THREAD)):
            return (
                f'the thread\'s name begins with "-", and {key} of runner {runner.name!r} passes it'
                " as an argument of its own: choose another name"
            )
    return None


def commands(runner: CommandRunner) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, argv) of each command that ``runner`` may run."""
    for key in ("argv", "next_argv", "resume_argv"):
        if argv := getattr(runner, key):
            yield key, argv


def warnings(config: Config) -> Iterator[tuple[str, str, str]]:
    """(runner's name, what a prompt could become in its argv, what to do about it)."""
    for name, runner in config.runners.items():
        if isinstance(runner, CommandRunner):
            for key, argv in commands(runner):
                for said, fix in _warnings(key, argv):
                    yield name, said, fix


def _warnings(key: str, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    if argv and PROMPT in argv[0]:
        yield "a prompt chooses the program", f"name the program in {key}[0]"
    for index, lead in _leads(argv):
        yield (
            (
                f"{key}[{index}] makes an option's name of the prompt: all prompts are refused"
                if lead
                else f'{key}[{index}] is the prompt alone: one that begins with "-" is refused'
            ),
            SAFE,
        )
    for index, program in _code(argv):
        yield (
            f"{key}[{index}] has a prompt run as code by {program}",
            'pass it as an argument: ["sh", "-c", "my-agent -- \\"$1\\"", "--", "{prompt}"],'
            " or on stdin",
        )


def _leads(argv: Sequence[str], what: str = PROMPT) -> Iterator[tuple[int, str]]:
    """(index, what stands before the prompt) where a prompt could become an option."""
    for index, part in enumerate(argv):
        lead, found, _ = part.partition(what)
        if index and part == "--":
            return
        if index and found and (not lead or _NAME.fullmatch(lead)):
            yield index, lead


def _code(argv: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index, program) where a prompt becomes program text."""
    names = [PurePath(part).name for part in argv]
    for index, part in enumerate(argv):
        if PROMPT not in part:
            continue
        if "ssh" in names[:index]:  # it makes one text of its arguments
            yield index, "the remote shell"
            continue
        for program, option in _INTERPRETERS:
            found = next((x for x in names[: index - 1] if program.fullmatch(x)), None)
            if found is not None and option.fullmatch(argv[index - 1]):
                yield index, found
                break
