"""What stands as an example runs: docstrings of the rooms, run files, scripts."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

from fastsft.train import load_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("room", ["capturing", "ops", "sketch"])
def test_the_example_of_a_room_runs(room: str) -> None:
    found = doctest.testmod(importlib.import_module(f"fastsft.{room}"))
    assert found.attempted > 1
    assert found.failed == 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_run_file_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.sources
    assert {source.ability for source in config.sources.values()} <= set(config.targets)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_script_uses_public_names_alone(path: Path) -> None:
    import fastsft

    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastsft"
    }
    assert used
    assert used <= set(fastsft.__all__)
    assert all(getattr(fastsft, name) is not None for name in used)
