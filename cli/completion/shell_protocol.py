"""What runctl and the shells' completion scripts say to each other.

A script (``completions/``) runs ``runctl`` with ``_RUNCTL_COMPLETE=SHELL_complete`` and
the words of the line as arguments, the unfinished one last; for bash the line itself.
The answer is a line for each candidate: kind, value and help, with tabs between. Kinds:
"plain", and "file" and "command", which the shell completes itself. click's own scripts
join and split words at white space, and quote nothing.

Whatever goes wrong there is no answer: completion must not write into a command line.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

from .argument_types import Completing

SCRIPTS = {"bash": "runctl", "zsh": "_runctl", "fish": "runctl.fish"}
#: Characters that need no quoting in bash.
_SAFE = re.compile(r"[\w@%+=:,./-]", re.ASCII)


def script(shell: str) -> str:
    return (Path(__file__).parents[1] / "completions" / SCRIPTS[shell]).read_text()


class _Complete(ShellComplete):
    def source(self) -> str:
        return script(self.name)

    def get_completion_args(self) -> tuple[list[str], str]:
        *words, word = sys.argv[1:] or [""]
        return words, word

    def complete(self) -> str:
        try:
            return super().complete()
        except Exception:
            return ""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        self.ctx_args["obj"] = Completing(args)
        given = "--" in args
        found = super().get_completions(list(args), incomplete)
        option, equals, _ = incomplete.partition("=")
        if equals and option.startswith("--") and not given:  # click completed the value alone
            for item in found:
                if item.type == "plain":
                    item.value = f"{option}={item.value}"
        if given or incomplete.startswith("-"):
            return found
        # A name like "-x" would be taken for an option, unless it is behind "--".
        return [item for item in found if not str(item.value).startswith("-")]

    def format_completion(self, item: CompletionItem) -> str:
        kind = "file" if item.type == "dir" else item.type
        return "\t".join((kind, str(item.value), " ".join((item.help or "").split())))


@dataclass
class Line:
    """A line as bash reads it. ``word``: the unfinished one, as it is without quotes;
    ``quote``: the quote that is open in it; ``kept``: how many of its characters stay,
    since readline replaces only what follows an open quote or a break such as ":"."""

    words: list[str] = field(default_factory=list)
    word: str = ""
    quote: str = ""
    kept: int = 0


def read_line(text: str, breaks: str) -> Line:
    line = Line()
    begun = False
    characters = iter(text)
    for c in characters:
        if line.quote:
            if c == line.quote:
                line.quote = ""
                line.kept = 0
            elif c == "\\" and line.quote == '"':
                following = next(characters, "")
                line.word += following if following in '\\"$`' else c + following
            else:
                line.word += c
        elif c.isspace():
            if begun:
                line.words.append(line.word)
                line.word, line.kept, begun = "", 0, False
            continue
        elif c in "\"'":
            line.quote = c
            line.kept = len(line.word)
        elif c == "\\":
            line.word += next(characters, "")
        else:
            line.word += c
            if c in breaks:
                line.kept = len(line.word)
        begun = True
    return line


def _quoted(text: str, quote: str) -> str:
    if quote:
        single = quote == "'"
        text = text.replace("'", "'\\''") if single else re.sub(r'([\\"$`])', r"\\\1", text)
        # readline closes the quote, unless what it inserted ends with that character.
        return text + quote if text.endswith(quote) else text
    return "".join(c if _SAFE.match(c) or not c.isascii() else "\\" + c for c in text)


class _Bash(_Complete):
    name = "bash"

    def get_completion_args(self) -> tuple[list[str], str]:
        self._line = read_line((sys.argv[1:] or [""])[0], os.environ.get("RUNCTL_WORDBREAKS", "=:"))
        return self._line.words[1:], self._line.word

    def format_completion(self, item: CompletionItem) -> str:
        if item.type == "plain":
            item.value = _quoted(str(item.value)[self._line.kept :], self._line.quote)
        return super().format_completion(item)


class _Zsh(_Complete):
    name = "zsh"


class _Fish(_Complete):
    name = "fish"


for shell in (_Bash, _Zsh, _Fish):
    add_completion_class(shell)
