"""The command line: each command is one call of the public API, which `--explain` prints."""

from __future__ import annotations

import json
import shutil
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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


class Loss(StrEnum):
    """What a sample's loss is, over its supervised tokens."""

    sum = "sum"
    mean = "mean"


Explain = Annotated[bool, typer.Option("--explain", help="Print the Python call instead of running it.")]


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
    from fastsft.train import load_config
    from fastsft.train import run as run_file

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
    run_dir: Annotated[Path, typer.Argument(help="Run directory of a finished `fastsft run`.")],
    checkpoint: Annotated[str, typer.Option(help="Step of a checkpoint, last, or all.")] = "last",
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
    damping: Annotated[float, typer.Option(help="Of EK-FAC, as a share of the mean eigenvalue.")] = 0.1,
    root: Annotated[Path | None, typer.Option(help="Folder that relative paths in the run file start from.")] = None,
    explain: Explain = False,
) -> None:
    """Sketch the gradient of every sample at a checkpoint into a store, for `fastsft search`."""
    given = {
        "out": None if out is None else str(out),
        "format": str(format),
        "size": size,
        "precondition": None if precondition == "none" else str(precondition),
        "loss": str(loss),
        "packing": packing,
        "max_tokens": max_tokens,
        "resume": resume,
        "seed": seed,
        "damping": damping,
        "root": None if root is None else str(root),
    }
    every = checkpoint == "all"
    named = int(checkpoint) if checkpoint.isdigit() else checkpoint
    if explain:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None or key != "root")
        typer.echo("import fastsft.train\n")
        if every:
            typer.echo(f"for step in fastsft.train.FinishedRun.open({str(run_dir)!r}).steps:")
        step = "step" if every else repr(named)
        typer.echo(f"{'    ' * every}fastsft.attribute({str(run_dir)!r}, checkpoint={step}, {said})")
        return
    from fastsft.train import ConfigError, FinishedRun, attribute

    with _plain_errors():
        if every and out is not None:
            raise ConfigError(
                f"--out names one folder, and --checkpoint all writes a store each: got {out}. Leave it out."
            )
        for each in FinishedRun.open(run_dir, root=root).steps if every else [named]:
            store = attribute(run_dir, checkpoint=each, **given)  # type: ignore[arg-type]
            typer.echo(f"store: {store.path}, {len(store)} sketches of {store.size} numbers, {store.format}")


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
    from fastsft.train import answer_lines, search_store

    with _plain_errors():
        answer = search_store(store, query, **given)  # type: ignore[arg-type]
    width = shutil.get_terminal_size((100, 24)).columns
    for line in answer_lines(answer, width=width, by_source=by_source):
        typer.echo(line)
    if json_file is not None:
        json_file.write_text(json.dumps(answer.as_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"all of it: {json_file}")


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
        from fastsft.record import RecordError
        from fastsft.store import StoreError
        from fastsft.train import AttachError, ConfigError

        if isinstance(error, AttachError | ConfigError | DataError | RecordError | StoreError):
            typer.echo(f"fastsft: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
