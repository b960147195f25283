"""The list of guards fits the tree: `make mutants` tries each of them."""

from __future__ import annotations

import mutants
import pytest

GUARDS = mutants.read_guards()
pytestmark = pytest.mark.short


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_is_there_and_has_a_test(guard: mutants.Guard) -> None:
    path = mutants.find_file(guard)
    assert mutants.apply(guard, path) != path.read_text()
    mutants.check_test(guard)


def test_what_does_not_fit_is_said() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)
    guard = GUARDS[0]
    with pytest.raises(mutants.Misfit, match="is not found"):
        mutants.find_file(guard._replace(old="no such line is there"))
    with pytest.raises(mutants.Misfit, match="stands more than once: "):
        mutants.find_file(guard._replace(old="from __future__ import annotations"))
    with pytest.raises(mutants.Misfit, match="is no Python"):
        mutants.apply(guard._replace(new="("), mutants.find_file(guard))
    for missing in ("tests/test_none.py::test_a", "tests/test_mutants.py::test_none"):
        with pytest.raises(mutants.Misfit, match="there is no test"):
            mutants.check_test(guard._replace(test=missing))


def test_what_pytest_says_of_failures() -> None:
    said = (
        "FAILED tests/a.py::test_b[x] - assert False\nERROR tests/a.py::test_c - FAILED to start\n"
    )
    assert mutants.failed_tests(said) == ["tests/a.py::test_b[x]"]
