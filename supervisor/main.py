"""Where ``runctld`` begins. Everything else is imported once signals are heard."""

from __future__ import annotations

from .early import Early


def main() -> None:
    early = Early()
    early.install()
    from .arguments import runctld

    runctld(obj=early)


if __name__ == "__main__":
    main()
