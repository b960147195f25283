"""Write the manual pages from the help texts: ``python docs/manpages.py [FOLDER]``.

Pages depend on the source alone: no date of today. Verbs come from the group itself.
"""

from __future__ import annotations

import re
import sys
from inspect import cleandoc
from pathlib import Path

import click
from runctl.cli.main import main as runctl
from runctl.protocol import __version__
from runctl.supervisor.lifecycle.arguments import runctld

HERE = Path(__file__).parent / "man"
FILES = """
.TP
.I $RUNCTL_CONFIG
The configuration file, unless \\fB\\-\\-config\\fR names one.
.TP
.I /etc/runctl/runctld.toml
.TQ
.I \\(ti/.config/runctl/runctld.toml
The configuration files that are looked for otherwise, in this order.
"""


def roff(text: str) -> str:
    """One line of text, so that roff takes nothing in it for a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti")
    text = text.replace("^", "\\(ha").replace("`", "\\(ga").replace("'", "\\(aq")
    return "\\&" + text if text.startswith(".") else text


def paragraphs(text: str) -> list[str]:
    """Help text as click has it: paragraphs; those that begin with \\b stay as they are."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\x08)", cleandoc(text)):
        head, _, rest = paragraph.partition("\n")
        if head.strip() == "\b":
            title, _, body = rest.partition("\n")
            if title.endswith(":") and body:  # a list of its own: "Examples:"
                lines += [f".SH {roff(title[:-1].upper())}"]
            else:
                body = rest
            if body.startswith("Exit codes: "):
                lines += exit_status(body)
            else:
                shown = [roff(line) for line in cleandoc(body).splitlines()]
                lines += [*between(lines), ".nf", *shown, ".fi"]
        elif paragraph.startswith("Exit codes: "):
            lines += exit_status(paragraph)
        else:
            shown = [roff(line.strip()) for line in paragraph.strip().splitlines()]
            lines += [*between(lines), *shown]
    return lines


def between(lines: list[str]) -> list[str]:
    """A new paragraph, unless a heading has just begun one."""
    return [".PP"] if lines and not lines[-1].startswith(".SH") else []


def exit_status(text: str) -> list[str]:
    return [".SH EXIT STATUS", *map(roff, text.removeprefix("Exit codes: ").splitlines())]


def page(ctx: click.Context, section: int, see: list[str]) -> str:
    command = ctx.command
    name = ctx.command_path.replace(" ", "-")
    help_text = command.help or ""
    short = (command.short_help or help_text.partition("\n\n")[0]).replace("\n", " ")
    short = short.strip().partition(". ")[0].rstrip(".")
    lines = [
        f'.TH {name.upper()} {section} "" "runctl {__version__}" "runctl manual"',
        ".SH NAME",
        f"{roff(name)} \\- {roff(short[:1].lower() + short[1:])}",
        ".SH SYNOPSIS",
        f".B {roff(ctx.command_path)}",
        roff(" ".join(command.collect_usage_pieces(ctx))),
        ".SH DESCRIPTION",
        *paragraphs(help_text),
    ]
    options = [p for p in command.get_params(ctx) if isinstance(p, click.Option)]
    records = [option.get_help_record(ctx) for option in options]
    lines.append(".SH OPTIONS")
    for option, text in filter(None, records):
        lines += [".TP", f".B {roff(option)}", roff(text or "No description.")]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for verb in command.list_commands(ctx):
            found = command.get_command(ctx, verb)
            assert found is not None
            lines += [".TP", f".BR {name}\\-{verb} (1)", roff(found.get_short_help_str(200))]
    if command.epilog:
        lines += paragraphs(command.epilog)
    if not ctx.command_path.startswith("runctl "):
        lines += [".SH FILES", FILES.strip().removeprefix(".PP\n")]
    lines += [".SH SEE ALSO", ",\n".join(f".BR {roff(other)}" for other in see)]
    return "\n".join(lines).replace(",\n.BR", " ,\n.BR") + "\n"


def context(
    command: click.Command, name: str, parent: click.Context | None = None
) -> click.Context:
    return click.Context(command, parent, info_name=name, **command.context_settings)


def pages() -> dict[str, str]:
    """File name to content."""
    ctx = context(runctl, "runctl")
    verbs = runctl.list_commands(ctx)
    found = {
        "runctl.1": page(ctx, 1, ["runctld (8)"]),
        "runctld.8": page(context(runctld, "runctld"), 8, ["runctl (1)"]),
    }
    for verb in verbs:
        command = runctl.get_command(ctx, verb)
        assert command is not None
        see = ["runctl (1)", "runctld (8)"]
        found[f"runctl-{verb}.1"] = page(context(command, verb, ctx), 1, see)
    return found


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for old in folder.glob("*.[18]"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
