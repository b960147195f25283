"""What the peers run, by the path of this file: it needs nothing but Python.

``print N``: the numbers to N at once. ``write N INTERVAL GATE``: a 0, and once the file
GATE is there N lines, one each INTERVAL seconds, that hold the time (ns) they are written at.
"""

import os
import sys
import time


def main(what: str, count: int, *more: str) -> None:
    if what == "print":
        sys.stdout.write("".join(f"{n}\n" for n in range(1, count + 1)))
        return
    interval, gate = more
    os.write(1, b"0\n")
    while not os.path.exists(gate):
        time.sleep(0.01)
    for _ in range(count):
        os.write(1, b"%d\n" % time.time_ns())
        time.sleep(float(interval))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
