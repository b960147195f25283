"""Finds out what breaks: random load on real daemons while their processes, servers,
connections, disks and clocks fail, all of it drawn from a seed; then an oracle looks at
what is left. ``python -m faults --help``; docs/reliability.md has the figures.

work, journal, plan: know nothing of the others
endpoint, parts, client: what a house is made of
house: the daemons and servers under test, of one profile
load, injectors: what happens to a house during a round
oracle: judges what a round left behind, and touches nothing
round, report, __main__
"""
