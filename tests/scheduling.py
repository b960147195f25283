"""Which of several pytest-xdist workers runs what: one test after the other to whoever is
free, but a module whose tests share something costly is for one worker."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

#: Modules with a daemon, or more, that all their tests share.
SHARING = {
    "test_completion.py",
    "test_doctor.py",
    "test_exit_codes.py",
    "test_hooks.py",
    "test_json.py",
    "test_metrics.py",
    "test_systemd.py",
    "test_systemd_restarts.py",
}


class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if module.rpartition("/")[2] in SHARING else nodeid
