"""The command line: its frozen surface, what it explains, its one-line errors, and the demo from end to end."""

import ast
import json
import shutil
import subprocess
import sys

import click
import pytest
import typer
from typer.testing import CliRunner

import fastsft
from fastsft import cli, ops
from fastsft.attribution.methods.registry import METHODS
from fastsft.record import Record
from fastsft.store import Store
from fastsft.train import FinishedRun
from fastsft.train.loop import prepare
from tests.train._run_file import write_run_file

COMMANDS = {
    "attribute": [
        "--by-source",
        "--checkpoint",
        "--damping",
        "--each",
        "--explain",
        "--format",
        "--help",
        "--json",
        "--loss",
        "--max-tokens",
        "--method",
        "--out",
        "--packing",
        "--precondition",
        "--query",
        "--resume",
        "--root",
        "--seed",
        "--size",
        "--tokens",
        "--top",
        "run_dir",
    ],
    "demo": ["--explain", "--help", "--out", "--quick", "--seed"],
    "doctor": ["--explain", "--help"],
    "evaluate": [
        "--budget",
        "--explain",
        "--help",
        "--methods",
        "--processes",
        "--removal",
        "--root",
        "run_dir",
    ],
    "mix plan": [
        "--budget",
        "--explain",
        "--help",
        "--out",
        "--pilots",
        "--priorities",
        "--processes",
        "--root",
        "--seed",
        "--share",
        "config",
    ],
    "report": ["--explain", "--help", "--open", "--pictures", "run_dir"],
    "run": ["--explain", "--help", "--resume", "--root", "config"],
    "search": [
        "--by-source",
        "--each",
        "--explain",
        "--help",
        "--json",
        "--query",
        "--root",
        "--run",
        "--top",
        "store",
    ],
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
    commands = dict(typer.main.get_command(cli.app).commands)
    for group in [name for name, command in commands.items() if hasattr(command, "commands")]:
        commands |= {f"{group} {name}": command for name, command in commands.pop(group).commands.items()}
    found = {}
    for name, command in commands.items():
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
        (
            ["evaluate", "runs/a", "--budget", "2h", "--methods", "ekfac,less", "--removal", "--root", "r"],
            [
                "if __name__ == '__main__':\n    print(evaluate('runs/a', methods=['ekfac', 'less'], budget='2h', "
                "processes=2, with_removal=True, root='r'))"
            ],
        ),
        (
            ["mix", "plan", "a.yaml", "--pilots", "9", "--budget", "2h", "--priorities", "maths=2,code=1"],
            [
                "if __name__ == '__main__':\n    print(plan_mix('a.yaml', pilots=9, share=0.25, processes=2, seed=0, "
                "priorities={'maths': 2.0, 'code': 1.0}, budget='2h'))"
            ],
        ),
        (
            ["attribute", "runs/a", "--checkpoint", "100", "--root", "r"],
            [
                "fastsft.attribute('runs/a', checkpoint=100, out=None, format='int8', size=4096, precondition='ekfac', "
                "loss='sum', packing=False, max_tokens=4096, resume=False, seed=0, damping=0.1, root='r')"
            ],
        ),
        (
            ["attribute", "runs/a", "--checkpoint", "all", "--precondition", "none", "--format", "1bit", "--resume"],
            [
                "for step in fastsft.train.FinishedRun.open('runs/a').steps:\n"
                "    fastsft.attribute('runs/a', checkpoint=step, out=None, format='1bit', size=4096, "
                "precondition=None, loss='sum', packing=False, max_tokens=4096, resume=True, seed=0, damping=0.1)"
            ],
        ),
        (
            ["attribute", "runs/a", "--query", "q.jsonl"],
            [
                "found = fastsft.attribute_queries('runs/a', 'q.jsonl', method='ekfac', checkpoint='all', top=20, "
                "each=False, tokens=False, max_tokens=4096)",
                "print('\\n'.join(fastsft.train.answer_lines(found, by_source=False)))",
            ],
        ),
        (
            [
                *["attribute", "runs/a", "--query", "maths", "--method", "grad_cos", "--checkpoint", "20"],
                *["--top", "3", "--each", "--tokens", "--json", "x", "--by-source", "--damping", "0.5", "--root", "r"],
            ],
            [
                "found = fastsft.attribute_queries('runs/a', 'maths', method='grad_cos', checkpoint=20, top=3, "
                "each=True, tokens=True, max_tokens=4096, damping=0.5, root='r')",
                "print('\\n'.join(fastsft.train.answer_lines(found, by_source=True)))",
            ],
        ),
        (
            ["search", "s", "--query", "q.jsonl", "--top", "3", "--each", "--by-source", "--run", "runs/a"],
            [
                "found = fastsft.search_store('s', 'q.jsonl', top=3, each=True, run='runs/a')",
                "print('\\n'.join(fastsft.train.answer_lines(found, by_source=True)))",
            ],
        ),
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


def test_attribute_and_search_after_a_run(tmp_path):
    path = write_run_file(tmp_path, sections={"train": {"steps": 6, "save_every": 3}, "attribution": {"store": True}})
    assert call("run", path, "--root", tmp_path).exit_code == 0
    result = call("attribute", tmp_path / "out", "--size", 512, "--checkpoint", "all")
    assert result.exit_code == 0, result.output
    store = tmp_path / "out/store/checkpoint-6"
    assert f"store: {store}, 36 sketches of 512 numbers, int8" in result.output
    assert "store/checkpoint-3" in result.output
    assert_one_sentence(call("attribute", tmp_path / "out"), "holds a store already", "choose another `out`")
    assert_one_sentence(call("attribute", tmp_path / "out", "--checkpoint", "all", "--out", "s"), "Leave it out")

    query = tmp_path / "clouds.jsonl"
    for place, rows in ((store, 36), (tmp_path / "out/store/training", 24)):
        result = call("search", place, "--query", query, "--top", 2, "--by-source", "--json", tmp_path / "found.json")
        assert result.exit_code == 0, result.output
        assert f"{place}: {rows} rows" in result.output
        found = json.loads((tmp_path / "found.json").read_text())
        [answer] = found["answers"]
        assert [len(answer[side]) for side in ("helpful", "harmful")] == [2, 2]
        assert answer["helpful"][0]["score"] > 0 > answer["harmful"][0]["score"]
        assert answer["helpful"][0]["id"] in result.output
        assert max(answer["by_source"], key=lambda name: answer["by_source"][name]["mean"]) == "clouds"

    explained = call("search", store, "--query", query, "--top", 2, "--explain").output
    printed = subprocess.run([sys.executable, "-c", explained], capture_output=True, text=True, check=True, timeout=120)
    assert f"{store}: 36 rows" in printed.stdout
    assert "most harmful" in printed.stdout
    explained = call("attribute", tmp_path / "out", "--out", tmp_path / "s", "--size", 64, "--explain").output
    subprocess.run([sys.executable, "-c", explained], capture_output=True, check=True, timeout=120)
    assert len(Store.open(tmp_path / "s")) == 36

    for option, value, words in (
        ("--size", 100, "multiple of 16"),
        ("--damping", 0, "above 0"),
        ("--max-tokens", 0, ""),
    ):
        assert_one_sentence(call("attribute", tmp_path / "out", "--out", tmp_path / "new", option, value), words)
    assert_one_sentence(call("search", store, "--query", query, "--top", 5000), "`top` must be from 1 to 4096")
    weights = tmp_path / "out/checkpoints/checkpoint-6/adapter_model.safetensors"
    weights.write_bytes(weights.with_name("optimizer.pt").read_bytes())
    assert_one_sentence(call("search", store, "--query", query), "their digests differ")
    assert_one_sentence(call("search", tmp_path / "absent", "--query", query), "is not a store")


def test_a_query_is_answered_at_once_after_a_run(tmp_path):
    path = write_run_file(tmp_path, sections={"train": {"steps": 6, "save_every": 2}})
    assert call("run", path, "--root", tmp_path).exit_code == 0
    out, query = tmp_path / "out", tmp_path / "clouds.jsonl"
    options = ["--top", 2, "--by-source", "--tokens", "--json", tmp_path / "found.json"]
    result = call("attribute", out, "--query", query, "--method", "grad_dot", *options)
    assert result.exit_code == 0, result.output
    assert f"grad_dot at checkpoints 2, 4, 6 of {out}: 36 samples" in result.output
    assert "score: nats per response token" in result.output
    assert "36/36" in result.stderr  # the progress bar
    found = json.loads((tmp_path / "found.json").read_text())
    [answer] = found["answers"]
    assert [len(answer[side]) for side in ("helpful", "harmful")] == [2, 2]
    assert answer["helpful"][0]["id"] in result.output
    assert answer["helpful"][0]["marked"][0]["score"] > 0 > answer["harmful"][0]["marked"][0]["score"]
    assert max(answer["by_source"], key=lambda name: answer["by_source"][name]["mean"]) == "clouds"
    assert not (out / "store").exists()

    result = call("attribute", out, "--query", query, "--method", "bm25", "--top", 1)
    assert "highest scores:" in result.output
    assert "helpful" not in result.output
    result = call("attribute", out, "--query", "maths", "--method", "in_run", "--top", 1)
    assert "query: maths" in result.output

    explained = call("attribute", out, "--query", query, "--method", "tracin", "--top", 1, "--explain").output
    printed = subprocess.run([sys.executable, "-c", explained], capture_output=True, text=True, check=True, timeout=120)
    assert f"tracin at checkpoints 2, 4, 6 of {out}" in printed.stdout

    for options, words in (
        (["--query", query, "--format", "int8"], "--format says how a store is written, and --query writes none"),
        (["--method", "ekfac"], "--method says how a query is answered: name a file"),
        (["--json", tmp_path / "x.json"], "--json says how a query is answered"),
        (["--query", query, "--tokens"], "--tokens goes into the file of --json"),
        (["--query", query, "--method", "random", "--damping", 0.1], "random has no setting `damping`"),
        (["--query", query, "--damping", 0], "above 0"),
        (["--query", query, "--checkpoint", 3], "name one of the steps 2, 4, 6"),
        (["--query", tmp_path / "absent.jsonl"], "no such file"),
        (["--query", query, "--method", "in_run"], "own abilities"),
    ):
        assert_one_sentence(call("attribute", out, *options), words)


def test_every_method_can_be_named():
    assert [str(each) for each in cli.Method] == list(METHODS)


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
    assert_one_sentence(call("mix", "plan", good, "--pilots", 3), "3 pilots can't tell 3 sources apart", "5 or more")
    assert_one_sentence(call("mix", "plan", good, "--priorities", "maths"), "as maths=2,code=1: got 'maths'")
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
    finished = FinishedRun.open(out)  # its data and base model are kept with it
    prepared = prepare(finished.config, finished.load(finished.checkpoint())[1], finished.root)
    assert {row.id for row in prepared.rows} >= set(Record.open(out).samples()["id"].to_pylist())
    planted = summary["planted"]
    print({name: planted[name] for name in planted if "auc" in name})
    assert planted["harmful_auc"] > planted["random_auc"] + 0.1
