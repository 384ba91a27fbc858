"""The methods by name: what each needs besides model, checkpoints and samples, and how it is made."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, Literal

from fastsft.attribution.methods._base import Method

# decode: Row -> text; run_dir: a finished run; schedule: its steps (`_replay.Schedule`): given to `make`.
# moments: the optimizer's, of each checkpoint: given to `fit` as `optimizer_state`
Need = Literal["decode", "run_dir", "schedule", "moments"]
# which of the checkpoints given to `fit` a method reads: all, the last, the one before step 1, or none
Reads = Literal["every", "last", "start", "none"]

_WHY = {
    "decode": "compares texts: give `decode`, a function from a Row to its text",
    "run_dir": "reads what a run booked: give `run_dir`",
    "schedule": "goes back through every step of a run: give `schedule`, its batches and learning rates",
    "moments": "reads the optimizer's moments at every checkpoint: give them as `moments` here, and to `fit` as "
    "`optimizer_state`",
}
# what `make` may be given for methods that can do with it, without its being asked for
_OFFERED = (*_WHY, "batching", "final")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method: its class as "module:class" of this folder, and what it needs."""

    home: str
    about: str
    needs: tuple[Need, ...] = ()
    reads: Reads = "every"
    # whether it scores tokens too
    tokens: bool = False
    # ranks samples, and does not say that they help
    is_baseline: bool = False

    def load(self) -> type[Any]:
        """Import the class."""
        module, name = self.home.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    @property
    def settings(self) -> list[str]:
        """The names of what its class can be told."""
        return list(inspect.signature(self.load()).parameters)


METHODS: dict[str, Entry] = {
    "grad_dot": Entry(home="grad_dot:GradDot", about="dot product of gradients", tokens=True),
    "grad_cos": Entry(home="grad_cos:GradCos", about="cosine of gradients", tokens=True),
    "tracin": Entry(home="tracin:TracIn", about="dot products of gradients along the run", tokens=True),
    "adam_dot": Entry(
        home="adam_dot:AdamDot", about="the same in Adam's step lengths", needs=("moments",), tokens=True
    ),
    "ekfac": Entry(home="ekfac:EkFac", about="influence function, EK-FAC's curvature", tokens=True),
    "ekfac_cg": Entry(
        home="ekfac_cg:EkFacCg", about="the same, its inverse refined by conjugate gradient", tokens=True
    ),
    "less": Entry(home="less:Less", about="cosine of Adam's step with the query's gradient", needs=("moments",)),
    "trak": Entry(home="trak:Trak", about="kernel regression on projected gradients"),
    "logra": Entry(home="logra:LoGra", about="influence function in two-sided projections", tokens=True),
    "datainf": Entry(
        home="datainf:DataInf", about="influence function, inverses of single samples averaged", tokens=True
    ),
    "unrolled": Entry(
        home="unrolled:Unrolled", about="derivative through every step of the run", needs=("schedule",), reads="start"
    ),
    "in_run": Entry(
        home="in_run:InRun", about="what the run booked while it trained", needs=("run_dir",), reads="last"
    ),
    "bm25": Entry(home="bm25:Bm25", about="shared words", needs=("decode",), reads="none", is_baseline=True),
    "embedding": Entry(
        home="embedding:Embedding", about="cosine of mean hidden states", reads="last", is_baseline=True
    ),
    "loss": Entry(home="loss:Loss", about="the sample's own loss", reads="last", is_baseline=True),
    "length": Entry(home="length:Length", about="response tokens of the sample", reads="none", is_baseline=True),
    "random": Entry(home="random:Random", about="chance", reads="none", is_baseline=True),
}


def entry(name: str) -> Entry:
    """Find a method by its name."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}."
        raise ValueError(f"there is no method {name!r}: {hint}")
    return METHODS[name]


def make(name: str, **context: Any) -> Method:
    """Make a method, not fitted yet.

    context: what methods may need (`decode`, `run_dir`, `schedule`, `moments`) or can do with (`batching`; `final`, the
    weights after the last step), of which those that this one has no use for are left out; and settings of its own, of
    which one that it does not have is refused.
    """
    found = entry(name)
    for need in found.needs:
        if context.get(need) is None:
            raise ValueError(f"{name} {_WHY[need]}.")
    known = found.settings
    settings = {key: value for key, value in context.items() if key in known}
    for key in context:
        if key not in (*_OFFERED, *known):
            own = [each for each in known if each not in _OFFERED]
            has = f"it has {', '.join(own)}" if own else "it has none"
            raise ValueError(f"{name} has no setting `{key}`: {has}. Leave it out.")
    return found.load()(**settings)
