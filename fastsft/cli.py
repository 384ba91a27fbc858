"""The command line: each command is one call of the public API, which `--explain` prints."""

from __future__ import annotations

import json
import shutil
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Keep the books of a fine-tuning run: what every sample and source did to every ability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """How a store keeps its rows."""

    bf16 = "bf16"
    int8 = "int8"
    bit = "1bit"


class Precondition(StrEnum):
    """By what gradients are whitened."""

    none = "none"
    adam = "adam"
    ekfac = "ekfac"


class Method(StrEnum):
    """By what samples are scored for a query; fastsft.attribution.methods.registry.METHODS says more of each."""

    grad_dot = "grad_dot"
    grad_cos = "grad_cos"
    tracin = "tracin"
    adam_dot = "adam_dot"
    ekfac = "ekfac"
    ekfac_cg = "ekfac_cg"
    less = "less"
    trak = "trak"
    logra = "logra"
    datainf = "datainf"
    unrolled = "unrolled"
    in_run = "in_run"
    bm25 = "bm25"
    embedding = "embedding"
    loss = "loss"
    length = "length"
    random = "random"


class Loss(StrEnum):
    """What a sample's loss is, over its supervised tokens."""

    sum = "sum"
    mean = "mean"


Explain = Annotated[bool, typer.Option("--explain", help="Print the Python call instead of running it.")]

mix_app = typer.Typer(help="Choose how sources are mixed.", no_args_is_help=True)
app.add_typer(mix_app, name="mix")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory to write.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the world, the model and the training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller world, for a first look.")] = False,
    explain: Explain = False,
) -> None:
    """Train and fine-tune a small model on a generated world, and report. About two minutes on two CPU cores."""
    if explain:
        typer.echo(f"from fastsft.train.demo import demo\ndemo({str(out)!r}, seed={seed}, quick={quick})")
        return
    from fastsft.train.demo import demo as run_demo

    with _plain_errors():
        _finish(run_demo(out, seed=seed, quick=quick).record.out)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Run file (see examples/).")],
    root: Annotated[Path | None, typer.Option(help="Folder that relative paths in the run file start from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    explain: Explain = False,
) -> None:
    """Fine-tune with attribution from one file, and report."""
    if explain:
        given = "" if root is None else f", root=Path({str(root)!r})"
        imports = "import fastsft" if root is None else "from pathlib import Path\n\nimport fastsft"
        typer.echo(f"{imports}\nfastsft.run(fastsft.load_config({str(config)!r}){given}, resume={resume})")
        return
    from fastsft.mixing.run import run as run_file
    from fastsft.train import load_config

    with _plain_errors():
        _finish(run_file(load_config(config), root=root, resume=resume).record.out)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Also write the charts as SVG and PNG into this folder.")
    ] = None,
    explain: Explain = False,
) -> None:
    """Write report.html and report.json of a run, finished or not."""
    if explain:
        typer.echo(f"from fastsft.report import write_pictures, write_report\nwrite_report({str(run_dir)!r})")
        if pictures is not None:
            typer.echo(f"write_pictures({str(run_dir)!r}, {str(pictures)!r})")
        return
    from fastsft.report import write_pictures, write_report

    with _plain_errors():
        page = write_report(run_dir)
        typer.echo(str(page))
        if pictures is not None:
            for path in write_pictures(run_dir, pictures):
                typer.echo(str(path))
        if open_page:
            webbrowser.open(page.resolve().as_uri())


@app.command()
def attribute(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(help="Run directory of a finished `fastsft run`.")],
    query: Annotated[
        Path | None,
        typer.Option(help="Answer at once, without a store: a file of rows, or the name of a target of the run."),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="With --query: how samples are scored.", show_default="ekfac")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Step of a checkpoint, last, or all.", show_default="last; with --query all"),
    ] = None,
    top: Annotated[int, typer.Option(help="With --query: samples to show of either sign.")] = 20,
    each: Annotated[bool, typer.Option("--each", help="With --query: also every query by itself.")] = False,
    by_source: Annotated[
        bool, typer.Option("--by-source", help="With --query: also sums and means by source.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="With --query and --json: also the tokens that carry the score.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --query: also write all of it into this file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Store to write; RUN/store/checkpoint-STEP unless told.")] = None,
    format: Annotated[Format, typer.Option(help="Of the rows: 8192, 4096 or 512 bytes at size 4096.")] = Format.int8,
    size: Annotated[int, typer.Option(help="Numbers of a sketch, a multiple of 16.")] = 4096,
    precondition: Annotated[
        Precondition, typer.Option(help="What gradients are whitened by; `none` finds samples far less well.")
    ] = Precondition.ekfac,
    loss: Annotated[Loss, typer.Option(help="A sample's loss: sum or mean over its supervised tokens.")] = Loss.sum,
    packing: Annotated[bool, typer.Option("--packing", help="Samples end to end instead of padded.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 4096,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last whole shard.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sketch.")] = 0,
    damping: Annotated[
        float | None,
        typer.Option(help="Of curvature, as a share of the mean eigenvalue.", show_default="0.1, or the method's own"),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that relative paths in the run file start from.")] = None,
    explain: Explain = False,
) -> None:
    """Say which samples of a run helped and harmed a query; without one, store every sample's sketch for `search`.

    With --query the samples are scored at once. Without it, the gradient of every sample at a checkpoint is sketched
    into a store, which `fastsft search` asks as often as you like.
    """
    named = int(checkpoint) if checkpoint is not None and checkpoint.isdigit() else checkpoint
    somewhere = {} if root is None else {"root": str(root)}
    with _plain_errors():
        _check_use(context, asks=query is not None)
        if query is not None:
            _answer(
                run_dir,
                query,
                {
                    "method": str(method or "ekfac"),
                    "checkpoint": "all" if named is None else named,
                    "top": top,
                    "each": each,
                    "tokens": tokens,
                    "max_tokens": max_tokens,
                    **({} if damping is None else {"damping": damping}),
                    **somewhere,
                },
                by_source=by_source,
                json_file=json_file,
                explain=explain,
            )
            return
        _store(
            run_dir,
            "last" if named is None else named,
            {
                "out": None if out is None else str(out),
                "format": str(format),
                "size": size,
                "precondition": None if precondition == "none" else str(precondition),
                "loss": str(loss),
                "packing": packing,
                "max_tokens": max_tokens,
                "resume": resume,
                "seed": seed,
                "damping": 0.1 if damping is None else damping,
                **somewhere,
            },
            explain=explain,
        )


# options of `attribute` that say how a store is written, and those that say how a query is answered
_OF_STORE = ("out", "format", "size", "precondition", "loss", "packing", "resume", "seed")
_OF_QUERY = ("method", "top", "each", "by_source", "tokens", "json_file")


def _check_use(context: typer.Context, *, asks: bool) -> None:
    """Refuse options that would be passed over."""
    from fastsft.train import ConfigError

    options = {each.name: each.opts[0] for each in context.command.params}
    for name in _OF_STORE if asks else _OF_QUERY:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            if asks:
                raise ConfigError(
                    f"{options[name]} says how a store is written, and --query writes none: leave it out."
                )
            raise ConfigError(f"{options[name]} says how a query is answered: name a file of queries with --query.")
    if context.params["tokens"] and context.params["json_file"] is None:
        raise ConfigError("--tokens goes into the file of --json, which is not given: name one.")


def _answer(
    run_dir: Path, query: Path, given: dict[str, Any], *, by_source: bool, json_file: Path | None, explain: bool
) -> None:
    if explain:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items())
        typer.echo(
            f"import fastsft.train\n\nfound = fastsft.attribute_queries({str(run_dir)!r}, {str(query)!r}, {said})"
        )
        typer.echo(f"print('\\n'.join(fastsft.train.answer_lines(found, by_source={by_source})))")
        return
    from fastsft.train import attribute_queries

    _show(attribute_queries(run_dir, query, **given), by_source, json_file)


def _store(run_dir: Path, checkpoint: int | str, given: dict[str, Any], *, explain: bool) -> None:
    every = checkpoint == "all"
    if explain:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items())
        typer.echo("import fastsft.train\n")
        if every:
            typer.echo(f"for step in fastsft.train.FinishedRun.open({str(run_dir)!r}).steps:")
        step = "step" if every else repr(checkpoint)
        typer.echo(f"{'    ' * every}fastsft.attribute({str(run_dir)!r}, checkpoint={step}, {said})")
        return
    from fastsft.train import ConfigError, FinishedRun, attribute

    if every and given["out"] is not None:
        raise ConfigError(
            f"--out names one folder, and --checkpoint all writes a store each: got {given['out']}. Leave it out."
        )
    root = Path(given["root"]) if "root" in given else None
    for each in FinishedRun.open(run_dir, root=root).steps if every else [checkpoint]:
        store = attribute(run_dir, checkpoint=each, **given)
        typer.echo(f"store: {store.path}, {len(store)} sketches of {store.size} numbers, {store.format}")


def _show(answer: Any, by_source: bool, json_file: Path | None) -> None:
    from fastsft.train import answer_lines

    width = shutil.get_terminal_size((100, 24)).columns
    for line in answer_lines(answer, width=width, by_source=by_source):
        typer.echo(line)
    if json_file is not None:
        json_file.write_text(json.dumps(answer.as_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"all of it: {json_file}")


@app.command()
def search(
    store: Annotated[Path, typer.Argument(help="Store of `fastsft attribute`, or RUN/store/training.")],
    query: Annotated[Path, typer.Option(help="File of rows {prompt, response} or {messages}: jsonl, parquet.")],
    top: Annotated[int, typer.Option(help="Samples to show of either sign.")] = 20,
    each: Annotated[bool, typer.Option("--each", help="Also every query by itself, not only their mean.")] = False,
    by_source: Annotated[bool, typer.Option("--by-source", help="Also sums and means by source.")] = False,
    run: Annotated[Path | None, typer.Option(help="The store's run directory, if it was moved.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it into this file.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that relative paths in the run file start from.")] = None,
    explain: Explain = False,
) -> None:
    """Say which samples most lower, and most raise, the loss on a file of queries.

    A positive score means that training on the sample lowers the query's loss (g_q . P g_i > 0): it helps.
    """
    given = {"top": top, "each": each} | {
        name: str(value) for name, value in (("run", run), ("root", root)) if value is not None
    }
    if explain:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items())
        typer.echo(f"import fastsft.train\n\nfound = fastsft.search_store({str(store)!r}, {str(query)!r}, {said})")
        typer.echo(f"print('\\n'.join(fastsft.train.answer_lines(found, by_source={by_source})))")
        return
    from fastsft.train import search_store

    with _plain_errors():
        answer = search_store(store, query, **given)  # type: ignore[arg-type]
    _show(answer, by_source, json_file)


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Run directory of a finished `fastsft run`.")],
    budget: Annotated[str, typer.Option(help="Wall time, as 90s, 30m or 2h; more narrows the intervals.")] = "30m",
    methods: Annotated[str, typer.Option(help="To judge beside bm25, embedding and random.")] = "ekfac,grad_cos",
    processes: Annotated[int, typer.Option(help="Retrainings at a time, a thread each.")] = 2,
    removal: Annotated[bool, typer.Option("--removal", help="Also retrain without each method's top samples.")] = False,
    root: Annotated[Path | None, typer.Option(help="Folder that relative paths in the run file start from.")] = None,
    explain: Explain = False,
) -> None:
    """Say whether scores of a run's samples are any good: retrain on subsets, compare with BM25 and chance."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    given = {"methods": names, "budget": budget, "processes": processes, "with_removal": removal}
    given |= {} if root is None else {"root": str(root)}
    if explain:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items())
        typer.echo("from fastsft.evaluate import evaluate\n\nif __name__ == '__main__':  # it spawns processes")
        typer.echo(f"    print(evaluate({str(run_dir)!r}, {said}))")
        return
    from fastsft.evaluate import evaluate as evaluate_run

    with _plain_errors():
        found = evaluate_run(run_dir, say=typer.echo, **given)  # type: ignore[arg-type]
    typer.echo(f"\n{found}")
    typer.echo(f"all of it: {run_dir / 'evaluate' / 'evaluate.json'}")


@mix_app.command("plan")
def mix_plan(
    config: Annotated[Path, typer.Argument(help="Run file (see examples/).")],
    pilots: Annotated[
        int, typer.Option(help="Short trainings, each of another mix: 2 more than sources, or more.")
    ] = 16,
    share: Annotated[float, typer.Option(help="Of the run's steps, that a pilot has.")] = 0.25,
    priorities: Annotated[
        str, typer.Option(help="Weights of the targets in the mean, as maths=2,code=1.", show_default="1 each")
    ] = "",
    budget: Annotated[
        str | None, typer.Option(help="Wall time, as 90s, 30m or 2h; no pilot is begun that would end after it.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Pilots at a time, a thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the mixes that are tried.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the run's own with -mix unless told.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that relative paths in the run file start from.")] = None,
    explain: Explain = False,
) -> None:
    """Predict the mix to start with from short pilot runs, and write it down for `mix.start` of a run file."""
    given: dict[str, Any] = {"pilots": pilots, "share": share, "processes": processes, "seed": seed}
    with _plain_errors():
        given |= {"priorities": _numbers("--priorities", priorities)} if priorities else {}
    given |= {} if budget is None else {"budget": budget}
    given |= {name: str(place) for name, place in (("out", out), ("root", root)) if place is not None}
    if explain:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items())
        typer.echo("from fastsft.mixing import plan_mix\n\nif __name__ == '__main__':  # it spawns processes")
        typer.echo(f"    print(plan_mix({str(config)!r}, {said}))")
        return
    from fastsft.mixing.plan import MIX, plan_mix

    with _plain_errors():
        plan = plan_mix(config, say=typer.echo, **given)
    typer.echo(f"\n{plan}")
    start = (Path(plan.out) / MIX).resolve()
    home = Path(root or ".").resolve()
    start = start.relative_to(home) if start.is_relative_to(home) else start  # as the run file's paths are read
    typer.echo(f"for the run file: mix: {{policy: ..., start: {start}}}")


def _numbers(option: str, text: str) -> dict[str, float]:
    """Read "name=number,name=number"."""
    from fastsft.train import ConfigError

    found = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise ConfigError(f"{option} must list numbers by name, as maths=2,code=1: got {part.strip()!r}.") from None
    return found


@app.command()
def doctor(explain: Explain = False) -> None:
    """Say which kernels run here, and why others don't."""
    if explain:
        typer.echo("from fastsft import ops\nprint(ops.backends())")
        return
    from fastsft import ops
    from fastsft.train import versions

    typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
    for op, backends in ops.backends().items():
        typer.echo(op)
        for backend, state in backends.items():
            typer.echo(f"  {backend}: {state}")


def _finish(out: Path) -> None:
    from fastsft.report import summary_lines

    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    typer.echo("")
    for line in summary_lines(summary):
        typer.echo(line)
    typer.echo(f"report: {out / 'report.html'}")


class _plain_errors:
    """Show what a user can mend as one sentence; anything else is a fault of ours and keeps its traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from fastsft.data import DataError
        from fastsft.evaluate import EvaluationError
        from fastsft.launch import LaunchError
        from fastsft.record import RecordError
        from fastsft.store import StoreError
        from fastsft.tasks import MixError
        from fastsft.train import AttachError, ConfigError

        mendable = AttachError, ConfigError, DataError, EvaluationError, LaunchError, MixError, RecordError, StoreError
        if isinstance(error, mendable):
            typer.echo(f"fastsft: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
