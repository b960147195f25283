"""``runctld`` that has each run claimed by DBOS's own look at all threads: ``python -m
bench.without_claim_sql ARGUMENTS..``"""

from __future__ import annotations

from runctl.supervisor.main import main
from runctl.supervisor.queue import claim_worker

if __name__ == "__main__":
    claim_worker.MOST_APART = 0  # so many threads are looked at by themselves
    main()
