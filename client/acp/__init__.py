"""The program that a run of an ``acp`` runner is: it starts an agent and speaks the Agent Client
Protocol with it (https://agentclientprotocol.com). Part of the run, it outlives daemons as any
command does.

``__main__`` starts a ``conversation``, for which there are ``agent`` (its process), ``session``,
``permissions``, ``display`` and ``output``; ``stops`` says how it ends.
"""
