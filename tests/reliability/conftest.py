"""The small set that the reliability tests train on, and a run of each engine that nobody disturbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SmallSet
from tests.reliability import runs


@pytest.fixture(scope="session")
def data(shapes: SmallSet) -> Path:
    """24 training and 8 validation images."""
    return shapes.root


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a whole run of an engine, made once."""
    made: dict[str, Path] = {}

    def whole(engine: str) -> Path:
        runs.need(engine)
        if engine not in made:
            output = tmp_path_factory.mktemp(f"undisturbed_{engine}")
            code, printed = runs.run(runs.arguments(engine, data, output))
            assert code == 0, printed
            made[engine] = output
        return made[engine]

    return whole
