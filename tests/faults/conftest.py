from __future__ import annotations

from collections.abc import Iterator

import pytest
from forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Start one parent process that has imported everything, for all tests of this folder."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()
