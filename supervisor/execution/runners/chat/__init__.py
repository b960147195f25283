"""The ``chat`` runner: a streamed completion from an OpenAI-compatible endpoint.

* ``runner``: a turn, from its request to its outcome; tries again, with less history
* ``request``: where it goes, with which key and which messages
* ``call``: one HTTP request, and what may go wrong with it
* ``body``: bytes of an answer -> events
* ``reply``: events -> text, and whether they were a whole reply; ``response``: those of the
  Responses API
* ``exchange``: what a turn's calls ask for, and how they go on with a reply that was cut;
  ``prefill``: by sending its beginning
* ``failures``: which failures heal by themselves, and which by a shorter history
* ``words``: what an endpoint says, in a line that may be shown

What counts as a reply, and what the reference (the ``openai`` package) makes of the same bytes:
docs/runners.md, tests/wire.
"""

from .runner import CANCEL_LIMIT, Chat

__all__ = ["CANCEL_LIMIT", "Chat"]
