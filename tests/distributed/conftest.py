"""Fixture: the runs of undisturbed commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from commands import SLOW, trained

from reseed.store.runs import Run


@pytest.fixture(scope="session")
def whole(
    tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Run]]:
    """Return a function that gives the runs of an undisturbed team, by strategy."""
    made: dict[str, dict[str, Run]] = {}

    def of(strategy: str) -> dict[str, Run]:
        if strategy not in made:
            line = [*tiny_overrides, *SLOW, f"runtime={strategy}", "runtime.ranks=2"]
            made[strategy] = trained(line, tmp_path_factory.mktemp(strategy) / "outputs")
        return made[strategy]

    return of
