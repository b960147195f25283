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
    """Print the script with which SHELL completes verbs, options, and the names of
    threads, runs and runners, for which it asks the daemon.

    Without a running daemon names are not completed; everything else is.
    """
    from ..completion.shell_protocol import script

    render.out(script(shell).rstrip())
