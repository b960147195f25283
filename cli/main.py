"""``runctl``: the group, the global options, and what errors look like.

Each verb's module is imported only when it is used, and nats only by a verb that
connects: start-up time is felt at every command.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..config.schema import ConfigError, FileError, RunctlError
from ..protocol import __version__, descriptors, hardening
from .common import (
    DETACHED,
    FAILED,
    NOT_FOUND,
    OK,
    REFUSED,
    UNAVAILABLE,
    USAGE,
    App,
    ReaderGone,
    Verb,
    WriteFailed,
)

#: Verb to (module, function), in the order of --help.
VERBS = {
    "submit": ("commands.submit", "submit"),
    "list": ("commands.list_", "list_"),
    "attach": ("commands.attach", "attach"),
    "top": ("top.app", "top"),
    "abort": ("commands.abort", "abort"),
    "wait": ("commands.wait", "wait"),
    "show": ("commands.show", "show"),
    "retry": ("commands.retry", "retry"),
    "purge": ("commands.purge", "purge"),
    "status": ("commands.status", "status"),
    "session": ("commands.session", "session"),
    "checkpoint": ("commands.checkpoint", "checkpoint"),
    "note": ("commands.note", "note"),
    "rehearse": ("commands.rehearse", "rehearse"),
    "restart": ("commands.restart", "restart"),
    "gateway": ("commands.gateway", "gateway"),
    "doctor": ("commands.doctor", "doctor"),
    "install-service": ("commands.install_service", "install_service"),
    "uninstall-service": ("commands.install_service", "uninstall_service"),
    "completion": ("commands.completion", "completion"),
    "demo": ("commands.demo", "demo"),
}


class LazyGroup(click.Group):
    """Imports a verb when it is asked for, and turns errors into one line and a code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, function = VERBS[cmd_name]
        package = (__package__ or "runctl.cli") + "."
        try:
            command = getattr(importlib.import_module(package + module), function)
        except ModuleNotFoundError as error:
            if error.name == package + module:  # an installation without it
                return None
            raise
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if self.get_command(ctx, word) is None and not ctx.resilient_parsing:
            from ..client.suggestions import guess_verb

            meant = guess_verb(word, VERBS)
            said = "" if meant is None else f" (did you mean: runctl {meant}?)"
            raise click.UsageError(f"no command {word[:80]!r}{said}", ctx)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        hardening.close_process()
        descriptors.fill()
        if os.environ.get("_RUNCTL_COMPLETE"):
            importlib.import_module((__package__ or "runctl.cli") + ".completion.shell_protocol")
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        stdout = sys.stdout
        try:
            code = super().main(args, prog_name or "runctl", complete_var, False, **extra)
            sys.stdout.flush()
        except BaseException as error:
            code = _report(error)
        if sys.stdout is not stdout:  # click has replaced it: its reader has gone
            sys.stdout, code = stdout, OK
        if not descriptors.flushed():
            descriptors.let_go_of_stdout()
        sys.exit(code or OK)


def _report(error: BaseException) -> int:
    """Say on stderr, in one line, what went wrong; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, ReaderGone):
        return OK
    if isinstance(error, WriteFailed):
        return _say(str(error), FAILED)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return _say("interrupted", DETACHED)
    if isinstance(error, click.ClickException):
        if isinstance(error, click.NoSuchOption):
            alike = _alike(error)
            error = click.NoSuchOption(error.option_name, error.message, alike, error.ctx)
        text = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            text = f"{text.rstrip('.')}; see: {error.ctx.command_path} --help"
        return _say(text, error.exit_code)
    if isinstance(error, FileError):
        return _say(str(error), UNAVAILABLE)
    if isinstance(error, ConfigError):
        return _say(str(error), USAGE)
    if isinstance(error, RunctlError):
        from ..protocol.errors import BadRequest, NotFound, Refused, Unavailable

        for kind, code in (
            (Unavailable, UNAVAILABLE),
            (BadRequest, USAGE),
            (NotFound, NOT_FOUND),
            (Refused, REFUSED),
        ):
            if isinstance(error, kind):
                return _say(str(error), code)
        return _say(str(error), FAILED)
    if os.environ.get("RUNCTL_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        if not where and error.errno == errno.ENOSPC:
            where = "cannot write: "
        return _say(f"{where}{error.strerror}", FAILED)
    return _say(
        f"unexpected {type(error).__name__}: {error}; RUNCTL_DEBUG=1 shows the traceback", FAILED
    )


def _alike(error: click.NoSuchOption) -> list[str]:
    """Options that may have been meant: the dashes, which all have, do not count."""
    from difflib import SequenceMatcher

    def likeness(option: str) -> float:
        return SequenceMatcher(None, error.option_name.strip("-"), option.strip("-")).ratio()

    return [option for option in error.possibilities or () if likeness(option) > 0.6]


def _say(text: str, code: int) -> int:
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    with contextlib.suppress(OSError):
        os.write(2, f"runctl: {shown}\n".encode(errors="replace"))
    return code


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  runctl submit build -- make test
  runctl attach build
  runctl list
\b
Exit codes: 0 done, the run succeeded; 1 the run failed or is dead, or the
operation failed; 2 usage; 3 no such thread or run; 4 daemon or NATS
unreachable; 5 the run was aborted; 6 refused; 130 detached with Ctrl-C.
\b
Tab completion for bash, zsh and fish: runctl completion --help""",
)
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The daemon's configuration file.  [default: $RUNCTL_CONFIG, then"
    " /etc/runctl/runctld.toml, then ~/.config/runctl/runctld.toml]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.version_option(__version__, prog_name="runctl")
@click.pass_context
def main(ctx: click.Context, config: Path | None, as_json: bool) -> None:
    """Submit, watch and abort runs: streaming work that survives its daemon."""
    app = ctx.ensure_object(App)
    app.config_file = config
    app.json = app.json or as_json
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(USAGE)
    if app.json:
        group = ctx.command
        assert isinstance(group, click.Group)
        command = group.get_command(ctx, ctx.invoked_subcommand)
        if command is not None and not isinstance(command, Verb):
            raise click.UsageError(f"{command.name} has no JSON output; leave out --json", ctx)


if __name__ == "__main__":
    main()
