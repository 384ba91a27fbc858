"""The command line: each command is one call of the public API, which `--explain` prints."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Keep the books of a fine-tuning run: what every sample and source did to every ability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
        from fastsft.train import AttachError, ConfigError

        if isinstance(error, AttachError | ConfigError | DataError | RecordError):
            typer.echo(f"fastsft: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
