"""``runctld``: the run supervisor.

Its packages, top down, each of which imports only lower ones::

    lifecycle > api > upkeep | peers > execution | messaging
        > processes | output | queue | cluster > host

``make check`` keeps the direction.
"""
