"""Where ``runctld`` begins. Everything else is imported once signals are heard."""

from __future__ import annotations

import gc

from ..protocol import descriptors
from .lifecycle.early_signals import Early


def main() -> None:
    descriptors.fill()
    early = Early()
    early.install()
    gc.disable()  # what is imported stays; ``service`` enables it
    from .lifecycle.arguments import runctld

    runctld(obj=early)


if __name__ == "__main__":
    main()
