"""The benchmarks of the system run, and their rows say what a reader needs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import aims, harness, memory, table
from benchmarks.rivals import environments, estimator_race, score
from benchmarks.rivals import run as rivals
from benchmarks.rivals.scores import _base as scores
from benchmarks.system import gated_step, in_run, index_build, index_case
from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._checkpoints import trainable

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_the_benchmark_of_a_step_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    small = "--hidden 64 --layers 1 --vocabulary 64 --batch 4 --length 144 --target-rows 2 --repeats 2"
    monkeypatch.setattr("sys.argv", ["in_run", *small.split(), "--json", str(out)])
    in_run.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for method in ("lora", "full"):
        mine = {row["provider"]: row for row in rows if row["mode"] == method}
        assert mine["plain step"]["ratio"] == 1.0
        assert all(row["median_ms"] > 0 for row in mine.values())
        assert {"bare hooks", "per-sample gradients materialised"} < set(mine)
        assert any(name.startswith("refresh") and row["amortised"] > 0 for name, row in mine.items())


def test_the_benchmark_of_gated_steps_runs_small() -> None:
    rows = gated_step.race(hidden=64, layers=1, batch_size=2, length=16, vocabulary=32, repeats=2)
    mine = {row["provider"]: row for row in rows}
    assert mine["one LoRA"]["ratio"] == 1.0
    assert set(gated_step.KINDS) < set(mine)
    assert all(row["saved_bytes"] > 0 and row["median_ms"] > 0 for row in rows)


def test_tables_of_gated_adapters_say_what_their_rows_say() -> None:
    rows = [json.loads(line) for line in (RESULTS / "ops_gated_adapter_cpu.jsonl").read_text().splitlines()]
    ours = next(row for row in rows if row["provider"] == "stacked function" and row["mode"] == "forward+backward")
    found = table.gated_table(RESULTS)
    assert f"| {ours['shape']} | stacked function |" in found
    assert f"{ours['ratio_to_reference']:.2f} ({ours['ratio_to_flops']:.2f})" in found
    arms = {json.loads(line)["arm"] for line in (RESULTS / "forgetting.jsonl").read_text().splitlines()}
    forgotten = table.forgetting_table(RESULTS)
    assert all(f"| letters | {arm} |" in forgotten for arm in arms)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_rows_name_machine_versions_commit_and_date(path: Path) -> None:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"op", "machine", "versions", "commit", "date"} <= set(row)


@pytest.fixture(scope="module")
def case_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index case of six short rows and a Llama of one narrow layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("case")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=24, **size)).save_pretrained(folder / "model")
    rows = []
    for number, length in enumerate((9, 5, 30, 12, 7, 21)):
        ids = [1 + (number + at) % 23 for at in range(length)]
        rows.append({"id": f"row-{number}", "source": "maths", "input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    (folder / "rows.json").write_text(json.dumps({"pad_id": 0, "rows": rows}))
    return folder


@pytest.mark.parametrize("order", ["sorted", "random"])
def test_batches_hold_every_row_once_within_the_tokens(
    case_folder: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_case, "BATCH_TOKENS", 64)
    rows = index_case.load_case(case_folder, "full").rows
    found = index_case.batches(rows, order)
    assert sorted(number for batch in found for number in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) * max(len(rows[number].input_ids) for number in batch) <= 64
    assert len(found) > 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_index_build_is_raced_against_both_steps(
    case_folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_build, "extra_peak", lambda prepare, **told: 2**20)
    row = index_build.race(case_folder, method, size=64, repeats=2)
    assert row["case"] == f"index_{method}"
    assert all(row[key]["ratio"] > 0 for key in ("to_sorted_step", "to_random_step"))  # type: ignore[index]
    # 64 bf16 numbers a row, and what the files of a store need beside them
    assert 2 * 64 < row["bytes_a_sample"] < 2 * 64 + 16384  # type: ignore[operator]
    assert row["extra_peak_mib"] == row["step_extra_peak_mib"] == 1.0


def hold(megabytes: int) -> Callable[[], object]:
    return lambda: torch.ones(megabytes * 2**18)


def test_memory_is_watched_in_a_process_of_its_own() -> None:
    # importing torch there is not counted: it takes over 100 MiB
    assert 63 < memory.extra_peak("tests.test_benchmarks:hold", megabytes=64) / 2**20 < 80


def test_every_aim_has_a_name_of_its_own_and_a_limit_or_says_that_it_has_none(capsys: pytest.CaptureFixture) -> None:
    found = aims.load()
    assert {"step_full_sjlt", "index_lora", "scan_1bit_q1", "ndcg_int8", "import_fastsft"} <= set(found)
    assert all(aim.name == name and aim.what and aim.against for name, aim in found.items())
    assert all(aim.at_most is None or aim.at_most > 0 for aim in found.values())


def test_an_aim_writes_a_signed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.aims import __main__ as command

    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["aims", "--only", "store_bytes_1bit", "--json", str(out)])
    command.main()
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"op", "case", "ratio", "p20", "p80", "aim", "met", "machine", "versions", "commit", "date"} <= set(row)
    # the arithmetic of the formats alone: K/8 + 4 bytes against 2 K, K = 4096
    assert 516 / 8192 < row["ratio"] < 1.1 * 516 / 8192
    assert row["met"] == (row["ratio"] <= row["aim"])


def test_a_ratio_is_taken_round_by_round() -> None:
    # a machine that slows threefold half-way changes both alike, and no ratio
    found = harness.ratio([1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0])
    assert found == harness.Ratio(0.5, 0.5, 0.5, 4)


def test_rounds_go_forwards_and_backwards_in_turn() -> None:
    seen: list[str] = []
    times = harness.rounds({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, repeats=2, warmup=1)
    assert "".join(seen) == "abbaab"
    assert [len(values) for values in times.values()] == [2, 2]


def test_the_peak_of_memory_that_is_freed_again_is_seen() -> None:
    found = memory.watch(hold(64)) / 2**20
    # the array itself; torch may touch some memory of its own
    assert 63 < found < 80


def test_a_rival_that_cannot_run_gives_a_row_that_says_why(case_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # this very python: it has no bergson
    monkeypatch.setattr(rivals, "python_of", lambda name, cache: Path(sys.executable))
    args = argparse.Namespace(cache=None, repeats=1, timeout=100)
    (row,) = rivals.race("bergson", "index_full", case_folder, args)
    assert row["rival"] == "bergson==2.5.1"
    assert "No module named 'bergson'" in str(row["error"])


@pytest.fixture
def scoring_case(case_folder: Path, tmp_path: Path) -> Callable[[str], tuple[torch.nn.Module, Path]]:
    """Write a case of two checkpoints -> the model at the last, and the case."""

    def write(method: str) -> tuple[torch.nn.Module, Path]:
        model = index_case.load_model(index_case.load_case(case_folder, method))
        first = Checkpoint("first", trainable(model), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        checkpoints = [first, Checkpoint("last", trainable(model), 3.0)]
        rows = index_build.rows_of(index_case.load_case(case_folder, method))
        told = {"base": case_folder / "model", "pad_id": 0}
        return model.eval(), scores.write_case(tmp_path / method, model, checkpoints, rows[:4], rows[4:], **told)

    return write


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_scoring_case_gives_back_rows_and_the_model_at_each_checkpoint(method: str, scoring_case: Callable) -> None:
    model, folder = scoring_case(method)
    case = scores.load_case(folder)
    assert (case.method, case.checkpoints, case.shares) == (method, ["first", "last"], [1.0, 3.0])
    assert [row.id for row in case.rows + case.queries] == [f"row-{number}" for number in range(6)]
    assert case.query_tokens.tolist() == [4, 18]
    again, first = scores.load_model(case), scores.load_model(case, 0)
    inputs = torch.tensor([case.rows[0].input_ids])
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert not torch.equal(first(inputs).logits, model(inputs).logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


def test_a_rival_that_cannot_score_gives_a_row_that_says_why(
    scoring_case: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this very python: it has no kronfluence
    monkeypatch.setattr(score, "python_of", lambda name, cache: Path(sys.executable))
    out = tmp_path / "scores"
    out.mkdir()
    (out / "kronfluence-ekfac.npy").write_bytes(b"of an earlier run")
    row = score.ask("kronfluence", "ekfac", scoring_case("lora")[1], out)
    assert "No module named 'kronfluence'" in row["error"]
    assert json.loads((out / "kronfluence-ekfac.json").read_text()) == row
    assert not (out / "kronfluence-ekfac.npy").exists()


def test_rows_that_were_sorted_for_a_rival_come_back_in_their_order(scoring_case: Callable) -> None:
    case = scores.load_case(scoring_case("full")[1])
    lines = scores.Lines(case.rows)
    assert [len(row.input_ids) for row in lines.rows] == sorted((len(row.input_ids) for row in case.rows), reverse=True)
    lengths = torch.tensor([[len(row.input_ids)] for row in lines.rows])
    assert lines.back(lengths, 0).flatten().tolist() == [len(row.input_ids) for row in case.rows]


def test_tokens_after_the_last_supervised_one_are_not_counted() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, -100, 8, 9]])
    assert scores.counted_mask(labels).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_the_time_of_more_rows_is_on_the_line_through_two_runs() -> None:
    assert estimator_race.at(1000, [(100, 7.0), (200, 9.0)]) == 25.0
    assert estimator_race.at(200, [(200, 9.0)]) == 9.0


def test_an_environment_is_made_once_and_again_when_its_list_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(environments.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(
        environments.venv, "create", lambda place, with_pip, clear: place.mkdir(parents=True, exist_ok=True)
    )
    assert environments.python_of("faiss", tmp_path) == tmp_path / "faiss" / "bin" / "python"
    assert [command[-1] for command in commands] == ["torch==2.13.0", "packaging", "faiss-cpu==1.15.1"]
    environments.python_of("faiss", tmp_path)
    assert len(commands) == 3
    monkeypatch.setattr(environments, "TORCH", "torch==2.14.0")
    environments.python_of("faiss", tmp_path)
    assert len(commands) == 6


SIGNED = {"machine": "a machine", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-01"}
ROW = {"op": "aims", "case": "one", "what": "this", "against": "that", "ratio": 0.5, "p20": 0.4, "p80": 0.6, "unit": ""}


def test_tables_are_made_of_committed_rows_and_nothing_else(tmp_path: Path) -> None:
    text = "before\n<!-- table:aims -->\nold\n<!-- /table -->\nbetween\n<!-- table:gpu -->\n<!-- /table -->\nafter\n"
    harness.write_rows(tmp_path / "aims_cpu.jsonl", [ROW | SIGNED | {"aim": 0.3, "met": False}])
    found = table.rewrite(text, tmp_path)
    assert "| this | that | 0.50 (0.40 to 0.60) | 0.30 | **not met** |" in found
    assert "Measured on a machine; torch 2.13.0; 2026-01-01." in found
    assert "old" not in found
    assert found.startswith("before\n")
    assert found.endswith(f"<!-- table:gpu -->\n{table.NOT_MEASURED}<!-- /table -->\nafter\n")
    assert table.rewrite(found, tmp_path) == found


def test_a_gpu_row_says_its_floor_and_whether_its_aim_was_met(tmp_path: Path) -> None:
    timed = {"median_ms": 0.356, "p20_ms": 0.35, "p80_ms": 0.37, "floor_ms": 0.125, "share_of_floor": 0.352}
    scan = {"op": "gpu", "case": "scan", "provider": "ours", "format": "1bit", "queries": 1, "aim_ms": 0.3} | timed
    part = {"op": "gpu", "case": "influence", "provider": "scores", "ratio": 1.05, "aim": 1.05} | timed
    harness.write_rows(tmp_path / "gpu_one.jsonl", [scan | SIGNED, part | SIGNED])
    found = table.gpu_table(tmp_path)
    measured = "0.356 ms (0.350 to 0.370) | 0.125 ms, 35 %"
    assert f"| scan 1bit Q=1 | ours | {measured} |  | 0.30 ms | **not met** |" in found
    assert f"| influence | scores | {measured} | 1.050 | 1.05 of the step | met |" in found


def test_rivals_stand_beside_us_and_errors_are_told(tmp_path: Path) -> None:
    ratios = {"to_sorted_step": {"ratio": 1.11}, "to_random_step": {"ratio": 0.81}}
    theirs = {"rival": "bergson==2.5.1", "case": "index_lora", "provider": "bergson", "what": "bergson build"}
    failed = {"rival": "traker==0.3.2", "case": "index_full", "provider": "traker", "error": "not done after 9 s"}
    sizes = {"extra_peak_mib": 483.2, "bytes_a_sample": 14336}
    harness.write_rows(tmp_path / "rivals_two.jsonl", [theirs | ratios | sizes | SIGNED, failed | SIGNED])
    found = table.rewrite("<!-- table:rivals -->\n<!-- /table -->\n", tmp_path)
    assert "| index_lora | bergson==2.5.1: bergson build | 1.11 | 0.81 | 483 MiB | 14336 B |" in found
    assert "| index_full | traker==0.3.2 | does not run here: not done after 9 s |" in found


def lds_row(setting: str, method: str, lds: list[float], **told: object) -> dict[str, object]:
    row = {"op": "system.lds", "setting": setting, "method": method, "lds": lds, "minus_bm25": [0.2, 0.1, 0.3]}
    return row | {"of_ceiling": 0.5, "seconds": None} | told | SIGNED


def test_the_table_of_lds_goes_by_the_first_setting_and_names_rivals(tmp_path: Path) -> None:
    shape = {"samples": 480, "queries": 48, "subsets": 40, "seeds": 4, "loss_drop": 0.51}
    lora = [
        lds_row("lora", "bm25", [0.1, 0.0, 0.2], minus_bm25=None, of_ceiling=float("nan")),
        lds_row("lora", "ekfac", [0.4, 0.3, 0.5]),
        lds_row("lora", "ekfac", [0.3, -0.1, 0.4], provider="kronfluence==1.0.1"),
        lds_row("lora", "ceiling", [0.8, 0.7, 0.9], **shape),
        lds_row("world", "loss", [0.9, 0.8, 1.0]),
    ]
    full = [lds_row("full", "length", [0.9, 0.8, 1.0]), lds_row("full", "ceiling", [0.9, 0.9, 0.9], **shape)]
    harness.write_rows(tmp_path / "lds_lora.jsonl", lora)
    one = table.lds_table(tmp_path)
    assert one.startswith(
        "- LoRA: 480 samples, 48 queries, 40 subsets with 4 seeds; ceiling 0.80 (0.70 to 0.90); training took 0.51 "
        "nats a token off the queries' loss\n\n| method | LoRA: LDS (95 %) | of ceiling | minus BM25 |\n"
    )
    harness.write_rows(tmp_path / "lds_full.jsonl", full)
    both = table.lds_table(tmp_path)
    columns = "LDS (95 %) | of ceiling | minus BM25 |"
    assert f"| method | LoRA: {columns} full: {columns}\n" in both
    assert [line.rstrip(" |") for line in both.splitlines() if line.startswith(("| ekfac", "| bm25", "| length"))] == [
        "| ekfac | 0.40 (0.30 to 0.50) | 50 % | +0.20 (+0.10 to +0.30)",
        "| ekfac (kronfluence==1.0.1) | 0.30 (-0.10 to 0.40) | 50 % | +0.20 (+0.10 to +0.30)",
        "| bm25 | 0.10 (0.00 to 0.20)",
        "| length |  |  |  | 0.90 (0.80 to 1.00) | 50 % | +0.20 (+0.10 to +0.30)",
    ]
    assert "loss" not in both.split("| method")[1]
    assert both.endswith("\nMeasured on a machine; torch 2.13.0; 2026-01-01.\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<!-- table:aims -->\nno end\n", "has no `<!-- /table -->`"),
        ("<!-- table:other -->\n<!-- /table -->\n", "there is no table 'other'"),
    ],
)
def test_wrong_markers_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        table.rewrite(text, tmp_path)


def test_the_tables_of_the_readme_are_those_of_the_committed_rows() -> None:
    text = (table.ROOT / "README.md").read_text()
    assert table.rewrite(text) == text, "run `python -m benchmarks.table`"


def test_the_benchmarks_run_under_pytest_and_not_with_the_tests() -> None:
    root = Path(__file__).parent.parent
    assert tomllib.loads((root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"] == [
        "tests"
    ]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-k", "sketch_matrix"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
