"""The environments as fixtures, and the mark on everything here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import envs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.systems)


@pytest.fixture(scope="session")
def arc_state() -> Path:
    """The environment that holds arc-state."""
    return envs.environment("arc-state")


@pytest.fixture(scope="session")
def frameworks() -> Path:
    """The interpreter that holds lightning, transformers, accelerate and peft."""
    return envs.python("frameworks")
