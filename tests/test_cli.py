"""The command line: its frozen surface, what it explains, its one-line errors, and the demo from end to end."""

import ast
import json
import shutil

import click
import pytest
import typer
from typer.testing import CliRunner

import fastsft
from fastsft import cli, ops
from fastsft.record import Record
from tests.train._run_file import write_run_file

COMMANDS = {
    "demo": ["--explain", "--help", "--out", "--quick", "--seed"],
    "doctor": ["--explain", "--help"],
    "report": ["--explain", "--help", "--open", "--pictures", "run_dir"],
    "run": ["--explain", "--help", "--resume", "--root", "config"],
}


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_one_sentence(result, *words):
    """Exit code 2, one line on stderr, no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line and "Loading weights:" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fastsft: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


def test_commands_and_options_are_frozen():
    group = typer.main.get_command(cli.app)
    found = {}
    for name, command in group.commands.items():
        context = click.Context(command)
        parameters = command.get_params(context)
        found[name] = sorted(option for each in parameters for option in (each.opts or [each.name]))
    assert found == COMMANDS


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (["demo"], ["demo('runs/demo', seed=0, quick=False)"]),
        (["demo", "--out", "x", "--seed", "3", "--quick"], ["demo('x', seed=3, quick=True)"]),
        (["run", "a.yaml"], ["fastsft.run(fastsft.load_config('a.yaml'), resume=False)"]),
        (
            ["run", "a.yaml", "--root", "r", "--resume"],
            ["fastsft.run(fastsft.load_config('a.yaml'), root=Path('r'), resume=True)"],
        ),
        (["report", "runs/a"], ["write_report('runs/a')"]),
        (["report", "runs/a", "--pictures", "p"], ["write_report('runs/a')", "write_pictures('runs/a', 'p')"]),
        (["doctor"], ["print(ops.backends())"]),
    ],
    ids=lambda each: " ".join(each) if each and " " not in each[0] else "",
)
def test_explain_prints_a_python_call_of_names_that_exist(arguments, calls):
    result = call(*arguments, "--explain")
    assert result.exit_code == 0
    tree = ast.parse(result.output)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    spoken = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert spoken == calls
    names = {}
    exec(compile(ast.Module(imports, []), "explained", "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert callable(eval(ast.unparse(node.func), names))


def test_doctor_names_every_op_and_backend():
    result = call("doctor")
    assert result.exit_code == 0
    assert f"fastsft {fastsft.train.versions()['fastsft']}" in result.output
    for op, backends in ops.backends().items():
        assert f"\n{op}\n" in result.output
        for backend, state in backends.items():
            assert f"  {backend}: {state}" in result.output


def test_run_trains_reports_and_resumes(tmp_path):
    path = write_run_file(tmp_path, sections={"train": {"steps": 6, "save_every": 3}})
    result = call("run", path, "--root", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"report: {tmp_path / 'out/report.html'}" in result.output
    assert "6/6" in result.stderr  # the trainer's progress bar
    assert_one_sentence(call("run", path, "--root", tmp_path), "already holds a run", "resume it")

    (tmp_path / "out/report.html").unlink()
    result = call("report", tmp_path / "out", "--pictures", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out/report.html") in result.output
    assert (tmp_path / "out/report.html").exists()
    assert list((tmp_path / "pictures").glob("*.svg"))

    assert_one_sentence(call("run", path, "--root", tmp_path, "--resume"), "all 6 steps", "fastsft report")
    shutil.rmtree(tmp_path / "out/checkpoints/checkpoint-6")
    result = call("run", path, "--root", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert [event["step"] for event in Record.open(tmp_path / "out").events("step")] == [1, 2, 3, 4, 5, 6]


def test_what_a_user_can_mend_is_one_sentence(tmp_path):
    good = write_run_file(tmp_path)
    assert_one_sentence(call("run", tmp_path / "absent.yaml"), "absent.yaml", "name a run file")
    torn = tmp_path / "torn.yaml"
    torn.write_text("model: [\nsources: {")
    assert_one_sentence(call("run", torn), "torn.yaml", "is not YAML")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(good.read_text().replace("batch_size:", "batchsize:"))
    assert_one_sentence(call("run", wrong), "wrong.yaml", "`train.batchsize`", "`train.batch_size`")
    assert_one_sentence(call("run", good, "--root", tmp_path, "--resume"), "no whole checkpoint")
    (tmp_path / "maths.jsonl").rename(tmp_path / "moved.jsonl")
    assert_one_sentence(call("run", good, "--root", tmp_path), "maths.jsonl: no such file")
    (tmp_path / "maths.jsonl").write_text('{"prompt": "w2"}\n')
    assert_one_sentence(call("run", good, "--root", tmp_path), "maths.jsonl, row 1", 'no field "response"')
    assert_one_sentence(call("report", tmp_path), "is not a run directory")
    old = tmp_path / "old"
    Record.create(old).append("start", 0, schema=99)
    assert_one_sentence(call("report", old), "has schema 99", "Read it with the fastsft that wrote it")
    assert_one_sentence(call("demo", "--quick", "--out", old), "already holds a run")


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(path):
        raise KeyError("ours")

    monkeypatch.setattr("fastsft.report.write_report", broken)
    result = call("report", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)


def test_demo_runs_end_to_end_and_finds_what_was_planted(tmp_path):
    out = tmp_path / "demo"
    result = call("demo", "--quick", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"report: {out / 'report.html'}" in result.output
    assert (out / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert summary["schema"] == 1
    assert summary["abilities"] == Record.open(out).start["abilities"]
    assert summary["sources"] == Record.open(out).start["sources"]
    assert summary["steps"] == Record.open(out).start["settings"]["steps"]
    assert summary["identity_error"] < 1e-4
    for ability in summary["abilities"]:
        entry = summary["ledger"][ability]
        explained = sum(entry["by_source"].values()) + entry["decay"] + entry["unfollowed"]
        assert abs(entry["measured"] - explained - entry["residual"]) < 1e-6
        assert abs(entry["measured"]) > 1e-3  # it did learn or forget something
    planted = summary["planted"]
    print({name: planted[name] for name in planted if "auc" in name})
    assert planted["harmful_auc"] > planted["random_auc"] + 0.1
