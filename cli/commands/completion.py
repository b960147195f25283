"""``runctl completion``: the script that teaches a shell to complete."""

from __future__ import annotations

import click

from ..display import render


@click.command(
    short_help="Print a shell's completion script.",
    epilog="""\b
Install it:
  bash  add to ~/.bashrc:        eval "$(runctl completion bash)"
  zsh   add to ~/.zshrc, after compinit:
                                 eval "$(runctl completion zsh)"
  fish  runctl completion fish > ~/.config/fish/completions/runctl.fish
\b
Examples:
  runctl attach <TAB>            (threads)
  runctl retry <TAB>             (recent runs that can be retried)
  runctl submit t --runner <TAB> (configured runners)""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that makes SHELL complete commands, options, and the names of threads,
    runs and runners.

    Names come from the daemon; while it is not running, only they are missing.
    """
    from ..completion.shell_protocol import script

    render.out(script(shell).rstrip())
