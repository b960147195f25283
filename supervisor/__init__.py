"""``runctld``: the run supervisor.

Imports go one way, strictly downwards::

    daemon > control > durable > runners, registry > stream, processes
        > wire > model > errors > config

``make check`` keeps the direction.
"""

__version__ = "0.1.0"
