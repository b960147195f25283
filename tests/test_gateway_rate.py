"""How often one may ask the gateway."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest
from conftest import Box, wait_until
from gateways import Gateway
from runctl.config.schema import Gateway as Settings
from runctl.gateway.access import _find_network
from runctl.gateway.rate_limit import RateLimit
from starlette.requests import HTTPConnection
from test_gateway import problem
from test_gateway_access import OPERATOR, READER, TABLES, bearer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.short
@pytest.mark.parametrize("seed", range(10))
def test_nobody_gets_more_than_the_burst_and_the_rate(seed: int) -> None:
    """At random moments, by many: against a count of what was let in."""
    r, clock = random.Random(seed), Clock()
    rate, burst = r.choice([1, 3, 200]), r.choice([1, 2, 50])
    limit = RateLimit(rate, burst, clock=clock)
    let_in: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for _ in range(400):
        clock.now += r.choice([0, 0, 0, r.random() / rate, r.random() * burst / rate / 10])
        who = r.choice("aab")
        if not (wait := limit.take(who)):
            let_in[who].append(clock.now)
            continue
        # One too many: with it there would be more than the burst within some time.
        times = [*let_in[who], clock.now]
        excess = max(
            len(times) - n - burst - rate * (clock.now - since) for n, since in enumerate(times)
        )
        assert excess > 0
        assert wait == pytest.approx(excess / rate)
        clock.now += wait
        assert limit.take(who) == 0.0
        let_in[who].append(clock.now)
    assert all(len(times) > burst for who, times in let_in.items() if who != "c")
    for times in let_in.values():
        for n, since in enumerate(times):
            for m, until in enumerate(times[n : n + 3 * burst + 3]):
                assert m + 1 <= burst + rate * (until - since) + 1e-6


@pytest.mark.short
def test_its_memory_is_bounded() -> None:
    clock = Clock()
    limit = RateLimit(1, 2, most_kept=100, clock=clock)
    assert [limit.take("busy") for _ in range(2)] == [0.0, 0.0]
    for n in range(1000):
        assert limit.take(n) == 0.0
        assert len(limit._due) <= 100
        # It asks all the time, and is not forgotten for the sake of others.
        assert limit.take("busy") > 0
    clock.now += 1000
    limit.take("one more")
    assert list(limit._due) == ["one more"]


@pytest.mark.short
def test_a_gateway_that_restarts_is_not_too_much_for_its_watchers() -> None:
    """All that one token may have come back at once, twice; and ask for a page each."""
    settings = Settings()
    limit = RateLimit(settings.max_rate, settings.max_burst, clock=Clock())
    assert not any(limit.take("token") for _ in range(2 * settings.max_watchers))
    assert limit.take("token") > 0


@pytest.mark.short
@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_addresses_of_one_network(one: str, other: str, same: bool) -> None:
    found = [
        _find_network(HTTPConnection({"type": "http", "client": (host, 1)}))
        for host in (one, other)
    ]
    assert (found[0] == found[1]) is same


def test_each_token_and_address_has_a_rate_of_its_own(stopped_box: Box, tmp_path: Path) -> None:
    """No daemon is needed: what describes the gateway is its own."""
    tokens, path = tmp_path / "tokens.toml", "/v1/openapi.json"
    tokens.write_text(TABLES)
    limits = "max_rate = 1\nmax_burst = 5\n"
    stopped_box.configure(f'[gateway]\ntokens_file = "{tokens}"\n{limits}')
    with closing(Gateway(stopped_box.config)) as gateway:

        def exhaust(address: str, headers: dict[str, str], code: int) -> None:
            answers = [gateway.get(address, headers=headers)]

            def is_limited() -> bool:
                answers.append(gateway.get(address, headers=headers))
                return answers[-1].status_code == 429

            wait_until(is_limited, "it is too much")
            assert len(answers) > 5
            assert {answer.status_code for answer in answers[:-1]} == {code}
            assert answers[-1].headers["retry-after"] == "1"
            assert "more than 1 requests a second" in problem(answers[-1], 429, "too-many-requests")

        exhaust(path, bearer(READER), 200)
        assert gateway.get(path, headers=bearer(OPERATOR)).status_code == 200
        exhaust(path, bearer("guess"), 401)  # whoever guesses does so slowly
        problem(gateway.get("/"), 429, "too-many-requests")  # from the same address
        assert gateway.get(path, headers=bearer(OPERATOR)).status_code == 200
        wait_until(lambda: gateway.get(path, headers=bearer(READER)).status_code == 200, "again")
