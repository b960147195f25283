"""Drives real agents' command lines through runctl, against a model of our own on loopback, and
counts what a kill costs: ``python -m agents --help``; docs/agents.md has the figures.

installation: the agents, from npm, in a cache outside the repository
recipes: what docs/agents.md has of them: runners, and figures
dialects/: how agents ask their models, and are answered
endpoint: the model, which counts
cast: what each agent needs to be at home without a network
stage: a private daemon, which can lose its machine
trial: a run, its kills, and what came of it
report: the figures, beside those of the page
"""
