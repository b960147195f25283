"""Where ``runctl`` begins: Ctrl-C while the rest is imported ends it without a traceback."""

from __future__ import annotations

import gc
import signal

from ..protocol import descriptors


def main() -> None:
    descriptors.fill()
    # What is imported stays: looking through it for garbage again and again takes time.
    gc.set_threshold(20_000)
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # not ignored, as in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .main import main as runctl

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runctl()
    finally:
        gc.freeze()  # nor is anything of it looked for at the end
        if ours:  # what it ends with is decided: Ctrl-C while Python ends is no other
            signal.signal(signal.SIGINT, signal.SIG_IGN)
