"""A round's plan: all of its load and faults, drawn from its seed before it begins."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from random import Random

EMBEDDED, SHARED = "embedded", "shared"
PROFILES = (EMBEDDED, SHARED)
EXECUTORS = {EMBEDDED: 1, SHARED: 3}
#: ``queue.outlive`` of most rounds, seconds: longer than any daemon is away.
LONG = 30.0

#: kind -> (how often it is drawn, least and longest seconds that it lasts).
KINDS: dict[str, dict[str, tuple[int, float, float]]] = {
    EMBEDDED: {
        "daemon killed": (5, 0, 0),
        "daemon killed, the next one late": (3, 0.3, 3.0),
        "daemon killed while it starts": (3, 0.1, 2.0),
        "daemon and keeper killed": (2, 0, 0),
        "daemon told to leave": (1, 0, 0),
        "daemon told to start again": (2, 0, 0),
        "runctl restart": (2, 0, 0),
        "daemon stopped and continued": (3, 0.2, 2.5),
        "daemon restarted": (3, 0, 0),
        "daemon restarted, clock wrong": (2, 0, 0),
        "keeper killed": (1, 0, 0),
        "nats-server killed": (4, 0, 0),
        "nats-server stopped and continued": (3, 0.2, 3.0),
        "nats-server restarted": (2, 0, 0),
        "clients' connections cut": (2, 0.0, 0.5),
        "clients' connections half closed": (1, 0, 0),
        "disk full": (3, 0.3, 1.5),
        "no file descriptors": (2, 0.3, 1.5),
    },
    SHARED: {
        "daemon killed": (5, 0, 0),
        "daemon killed, the next one late": (3, 0.3, 6.0),
        "daemon killed while it starts": (3, 0.1, 2.0),
        "daemon and keeper killed": (2, 0, 0),
        "daemon told to leave": (1, 0, 0),
        "daemon told to start again": (2, 0, 0),
        "runctl restart": (2, 0, 0),
        "daemon stopped and continued": (3, 0.2, 3.0),
        "daemon restarted": (3, 0, 0),
        "daemon restarted, clock wrong": (2, 0, 0),
        "keeper killed": (1, 0, 0),
        "nats-server killed": (3, 0, 0.8),
        "nats-server stopped and continued": (2, 0.2, 2.5),
        "nats-server restarted": (2, 0, 0),
        "PostgreSQL killed": (2, 0, 0.8),
        "PostgreSQL stopped and continued": (2, 0.2, 2.5),
        "PostgreSQL restarted": (1, 0, 0),
        "NATS connections cut": (2, 0.0, 0.8),
        "NATS connections half closed": (1, 0, 0),
        "NATS connections silent": (2, 0.3, 2.5),
        "NATS connections slow": (2, 0.5, 2.0),
        "PostgreSQL connections cut": (2, 0.0, 0.8),
        "PostgreSQL connections half closed": (1, 0, 0),
        "PostgreSQL connections silent": (2, 0.3, 2.5),
        "PostgreSQL connections slow": (2, 0.5, 2.0),
        "clients' connections cut": (1, 0.0, 0.5),
        "no file descriptors": (2, 0.3, 1.5),
    },
}

#: The same, of gateways; each round has one at least.
GATEWAY_KINDS: dict[str, tuple[int, float, float]] = {
    "gateway killed": (3, 0, 0),
    "gateway restarted": (2, 0, 0),
    "gateway stopped and continued": (2, 0.2, 2.0),
}
GATEWAYS = 2

#: Faults after which commands go on.
HARD = (
    "daemon killed",
    "daemon killed, the next one late",
    "daemon killed while it starts",
    "daemon told to start again",
)


@dataclass(frozen=True)
class Work:
    """One run: ``pause`` seconds after each of ``parts``, ``wait`` before it is submitted
    (after the one before it was accepted). ``kind``: its runner. ``code``: its exit code, or minus
    the signal that it ends itself by. ``prompt``: so many bytes are its stdin. ``again``:
    submitted so many times more."""

    run: str
    thread: str
    kind: str
    mode: str
    parts: int
    pause: float
    size: int
    code: int
    wait: float
    again: int
    prompt: int = 0

    @property
    def chat(self) -> bool:
        return self.kind == "chat"

    @property
    def exit_code(self) -> int:
        return self.code if self.code >= 0 else 128 - self.code


@dataclass(frozen=True)
class Act:
    """``what``: attach, http (attach over HTTP), follow (a thread), abort, purge or retry;
    ``until``: when a watcher leaves, 0: it stays; ``cuts``: after so many events each time one over
    HTTP breaks its connection itself, and comes back."""

    at: float
    what: str
    thread: str
    run: str | None = None
    until: float = 0.0
    force: bool = False
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fault:
    """``target``: which executor or gateway, where it is about one."""

    at: float
    kind: str
    target: int
    lasts: float


@dataclass(frozen=True)
class Plan:
    """``small``: the stream's max_bytes in this round, 0: there is room for all. ``outlive``:
    seconds that commands go on without a daemon, 0: they end with it."""

    seed: int
    profile: str
    lanes: dict[str, list[Work]] = field(default_factory=dict)
    acts: list[Act] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    small: int = 0
    skews: list[int] = field(default_factory=list)
    outlive: float = 0.0

    @property
    def works(self) -> dict[str, Work]:
        return {work.run: work for lane in self.lanes.values() for work in lane}

    @property
    def replay(self) -> str:
        return f"make faults SEED={self.seed} ROUNDS=1 PROFILE={self.profile}"

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    def schedule(self) -> list[str]:
        """What happens when, a line each; the load's submits are in the plan's file."""
        lines = [
            (fault.at, f"{fault.kind}, number {fault.target}, {fault.lasts:.2f} s")
            for fault in self.faults
        ]
        for act in self.acts:
            until = f", leaves at {act.until:.2f}" if act.until else ""
            force = " --force" if act.force else ""
            cuts = f", cut after {act.cuts}" if act.cuts else ""
            lines.append((act.at, f"{act.what} {act.thread} {act.run or ''}{force}{until}{cuts}"))
        first = [f"commands outlive their daemon by {self.outlive:g} s"]
        if self.small:
            first.append(f"the stream holds {self.small} bytes")
        return first + [f"{at:6.2f} s  {what}" for at, what in sorted(lines)]


def profile_of(seed: int, wanted: str) -> str:
    """The profile of the round with this seed, where ``wanted`` leaves it open ("mixed")."""
    return wanted if wanted in PROFILES else PROFILES[Random(f"profile {seed}").random() < 0.4]


def make(seed: int, profile: str, kinds: set[str]) -> Plan:
    """``kinds``: the faults that this machine permits. The draw does not depend on it."""
    r = Random(f"{profile} {seed}")
    length = 3.0 if profile == EMBEDDED else 4.5
    lanes = _lanes(r, seed)
    works = [work for lane in lanes.values() for work in lane]
    acts = _acts(r, lanes, works, length)
    faults = _faults(r, profile, length)
    small = r.choice([0] * 7 + [1024 * 1024]) if profile == EMBEDDED else 0
    skews = [r.choice([-7200, -90, 45, 86400]) for _ in range(3)]
    faults = [fault for fault in faults if fault.kind in kinds]
    # A short one runs out while a daemon is late, and at times while it starts.
    outlive = r.choice([0.0, 0.0, *[round(r.uniform(0.5, 3.0), 1)] * 3, *[LONG] * 7])
    over_http = _acts_over_http(r, works, length, Random(f"cuts {profile} {seed}"))
    acts = sorted([*acts, *over_http], key=lambda act: act.at)
    faults = sorted([*faults, *_gateway_faults(r, length)], key=lambda fault: fault.at)
    return Plan(seed, profile, lanes, acts, faults, small, skews, outlive)


def _lanes(r: Random, seed: int) -> dict[str, list[Work]]:
    lanes: dict[str, list[Work]] = {}
    number = 0
    names = ["plain", "two words", "日本語", "*", "purged"]
    for name in r.sample(names[:-1], 3) + names[-1:]:
        thread = f"{name} {seed}" if name != "plain" else f"plain-{seed}"
        lane = lanes[thread] = []
        for _ in range(r.randint(2, 4)):
            number += 1
            lane.append(_work(r, f"r{seed}-{number}", thread))
    return lanes


def _work(r: Random, run: str, thread: str) -> Work:
    kind = r.choices(["chat", "terminal", "shell"], [5, 3, 12])[0]
    mode = r.choice(["lines"] * 4 + ["tree", "stubborn", "reader", "reader", "steps", "steps"])
    if kind == "chat" or (kind == "terminal" and mode == "reader"):
        mode = "lines"
    shape = r.random()
    if shape < 0.15:
        parts, pause, size = r.randint(60, 150), 0.0, r.randint(500, 3000)
    elif shape < 0.3:
        parts, pause, size = r.randint(1, 2), r.uniform(0.3, 0.8), 5
    else:
        parts, pause, size = r.randint(5, 40), r.uniform(0.01, 0.2), r.randint(0, 300)
    code = 0 if kind == "chat" else r.choice([0, 0, 0, 0, 3, -9])
    prompt = r.randint(20, 400) * 1024 if mode == "reader" else 0
    again = r.choice([0, 0, 1, 2])
    return Work(
        run,
        thread,
        kind,
        mode,
        parts,
        round(pause, 3),
        size,
        code,
        round(r.uniform(0, 0.6), 2),
        again,
        prompt,
    )


def _acts(r: Random, lanes: dict[str, list[Work]], works: list[Work], length: float) -> list[Act]:
    acts = []
    threads = list(lanes)
    for _ in range(r.randint(4, 6)):
        work, at = r.choice(works), round(r.uniform(0.0, length), 2)
        leaves = round(at + r.uniform(0.5, 2.0), 2) if r.random() < 0.25 else 0.0
        acts.append(Act(at, "attach", work.thread, work.run, leaves))
    for thread in r.sample(threads, r.randint(1, 2)):
        acts.append(Act(round(r.uniform(0.0, length / 2), 2), "follow", thread))
    for _ in range(r.randint(1, 3)):
        work = r.choice(works)
        run = work.run if r.random() < 0.5 else None
        acts.append(Act(round(r.uniform(0.5, length), 2), "abort", work.thread, run))
    for _ in range(r.randint(1, 2)):
        at = round(r.uniform(1.0, length + 1), 2)
        acts.append(Act(at, "purge", threads[-1], force=r.random() < 0.3))
    for _ in range(r.randint(1, 2)):
        # A chat's work knows its run by the prompt, which a retry repeats.
        at = round(r.uniform(length / 2, length), 2)
        if commands := [work for work in works if not work.chat]:
            work = r.choice([work for work in commands if work.code] or commands)
            acts.append(Act(at, "retry", work.thread, work.run))
    return sorted(acts, key=lambda act: act.at)


def _acts_over_http(r: Random, works: list[Work], length: float, cutting: Random) -> list[Act]:
    """Watchers that come early, midway and late, some of which leave; of the longer half of the
    runs, since a watcher of the others has seen it all before anything happens to its gateway. Most
    break their connections as well: a gateway's death seldom comes while somebody hears of it."""
    acts = []
    longer = sorted(works, key=lambda work: work.parts * work.pause)[len(works) // 2 :]
    for part in (0.1, 0.1, 0.3, 0.5, 1.0, *r.choices([0.2, 0.7, 1.5], k=r.randint(0, 3))):
        work, at = r.choice(longer), round(part * length * r.uniform(0.5, 1.0), 2)
        leaves = round(at + r.uniform(0.5, 2.0), 2) if r.random() < 0.2 else 0.0
        cuts = tuple(cutting.choices([1, 2, 3, 5, 8, 13], k=cutting.randint(0, 4)))
        acts.append(Act(at, "http", work.thread, work.run, leaves, cuts=cuts))
    return acts


def _gateway_faults(r: Random, length: float) -> list[Fault]:
    weights = [weight for weight, _, _ in GATEWAY_KINDS.values()]
    faults = []
    for kind in r.choices(list(GATEWAY_KINDS), weights, k=r.randint(2, 5)):
        _, least, most = GATEWAY_KINDS[kind]
        lasts = round(r.uniform(least, most), 2)
        at = round(r.uniform(0.2, length), 2)
        faults.append(Fault(at, kind, r.randrange(GATEWAYS), lasts))
    return faults


def _faults(r: Random, profile: str, length: float) -> list[Fault]:
    kinds = KINDS[profile]
    names, weights = list(kinds), [weight for weight, _, _ in kinds.values()]
    faults = []
    # One at least takes daemons away from their runs.
    drawn = [r.choice(HARD), *r.choices(names, weights, k=r.randint(3, 5))]
    for kind in drawn:
        _, least, most = kinds[kind]
        lasts = round(r.uniform(least, most), 2)
        target = r.randrange(EXECUTORS[profile])
        faults.append(Fault(round(r.uniform(0.2, length), 2), kind, target, lasts))
    if profile == SHARED:
        # A daemon that ends while it clears up after its keeper leaves processes that nothing
        # ends until the next one starts there, and others may take over before: a known limit.
        alone = {fault.target for fault in faults if fault.kind == "keeper killed"}
        hard = ("daemon killed", "daemon and", "daemon stopped", "daemon told")
        faults = [f for f in faults if f.target not in alone or not f.kind.startswith(hard)]
    return sorted(faults, key=lambda fault: fault.at)
