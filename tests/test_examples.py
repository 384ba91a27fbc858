"""What stands as an example runs: docstrings of the rooms, run files, scripts."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shutil
from pathlib import Path

import pytest

import fastsft
from fastsft.mixing.run import steering_of
from fastsft.record import Record
from fastsft.train import load_config
from tests.train._run_file import write_run_file

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("room", ["adapters", "attribution.methods", "capturing", "mixing", "ops", "sketch", "store"])
def test_the_example_of_a_room_runs(room: str) -> None:
    found = doctest.testmod(importlib.import_module(f"fastsft.{room}"))
    assert found.attempted > 1
    assert found.failed == 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_run_file_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.sources
    assert {source.ability for source in config.sources.values()} <= set(config.targets)
    assert (steering_of(config) is not None) == config.steered


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_script_uses_public_names_alone(path: Path) -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastsft"
    }
    assert used
    assert used <= set(fastsft.__all__)
    assert all(getattr(fastsft, name) is not None for name in used)


def test_every_python_block_of_the_readme_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 4
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_scores_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "fastsft.attribution.methods" in block]
    path = write_run_file(tmp_path, sections={"train": {"steps": 2, "save_every": 1}}, out="runs/real")
    fastsft.run(fastsft.load_config(path), root=tmp_path)
    shutil.copy(tmp_path / "apples.jsonl", tmp_path / "train.jsonl")
    shutil.copy(tmp_path / "maths.jsonl", tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "if the sample were removed (influence function) torch.Size([12, 4])" in capsys.readouterr().out


def test_the_policy_of_the_readme_steers_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "class LiftTheWorst" in block]
    (tmp_path / "my_module_of_the_readme.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = {
        name: {"path": f"{name}.jsonl", "ability": own} for name, own in (("apples", "maths"), ("bricks", "code"))
    }
    mix = {"policy": "my_module_of_the_readme:LiftTheWorst"}
    fastsft.run(load_config(write_run_file(tmp_path, mix=mix, sources=sources)), root=tmp_path)
    first, *others = Record.open(tmp_path / "out").events("mix")
    assert first["weights"] == {"apples": 0.5, "bricks": 0.5}
    assert all("has the highest loss" in event["why"] for event in others)
    assert max(others[-1]["weights"].values()) > 0.55
