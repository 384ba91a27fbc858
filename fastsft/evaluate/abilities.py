"""What a model can do on held-out samples: its loss, and the share of answers, written by itself, that are right.

A finished run's checkpoint is a folder in the form of transformers or PEFT, so lm-eval's own tasks take it as it is:
`lm_eval --model hf --model_args pretrained=MODEL,peft=RUN/checkpoints/checkpoint-300 --tasks gsm8k` (of a full
fine-tuning `pretrained=RUN/checkpoints/checkpoint-300`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastsft.attribution import Targets
from fastsft.attribution.targets import ratio_error
from fastsft.data import IGNORED, Row, Sample, read_source, tokenize_all
from fastsft.evaluate._generate import evaluation, generate
from fastsft.evaluate.checks import Check, Checker
from fastsft.evaluate.intervals import Value
from fastsft.train import FinishedRun
from fastsft.train.loop import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class AbilityResult:
    """How a model does on one ability's samples.

    loss: nats per response token, with its standard error over draws of samples. value: the share of answers that
    passed their check, with Wilson's interval. checks: how many samples were judged by what. unfinished: answers that
    were cut at the limit of new tokens. failed: ids whose answer did not pass. answers: id -> what the model wrote.
    """

    loss: float
    loss_error: float
    value: Value
    number: int
    checks: dict[str, int]
    unfinished: int
    failed: list[str]
    answers: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        low, high = self.value.low, self.value.high
        return (
            f"{self.loss:.3f} ± {self.loss_error:.3f} nats a token; {100 * self.value.mean:.1f} % right "
            f"[{100 * low:.1f}, {100 * high:.1f}] of {self.number}"
        )


def of_run(
    run_dir: str | Path, checkpoint: int | str = "last", *, root: Path | None = None, **settings: Any
) -> dict[str, AbilityResult]:
    """Evaluate a finished run's checkpoint on the targets of its run file, the same rows as in training.

    settings: those of `evaluate_abilities`, which costs a forward pass and a generation of every target sample.
    """
    run = FinishedRun.open(run_dir, root=root)
    model, tokenizer, _ = run.load(run.checkpoint(checkpoint))
    targets = {
        name: read_source(name, at.path, ability=at.ability, limit=at.limit, where=at.where, root=run.root)
        for name, at in run.config.targets.items()
    }
    return evaluate_abilities(model, tokenizer, targets, **{"max_length": run.config.train.max_length, **settings})


def evaluate_abilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    targets: Mapping[str, Sequence[Sample]],
    *,
    max_length: int = 512,
    max_new_tokens: int = 256,
    checks: str | Mapping[str, str] = "auto",
    batch_tokens: int = 4096,
    seed: int = 0,
) -> dict[str, AbilityResult]:
    """Measure loss and right answers of every ability.

    Samples over `max_length` tokens are left out, and noted. Answers are written greedily, at most `max_new_tokens`
    long. checks: "auto" chooses by sample (`checks.Checker`); or the name of one check, or names by ability or sample
    id (by id first; the rest automatically). batch_tokens: tokens of a batch, the new ones included. seed: of the
    arguments that functions are called with.
    """
    for ability, samples in targets.items():
        if not samples:
            raise ValueError(f"target {ability!r} has no samples: give it held-out samples or leave it out.")
    limits = _Limits(max_length, max_new_tokens, batch_tokens)
    names = checks if isinstance(checks, Mapping) else dict.fromkeys(targets, checks)
    known = {*targets, *(sample.id for samples in targets.values() for sample in samples)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`checks` names {unknown[0]!r}, which is neither a target nor a sample's id: correct it.")
    return {
        ability: _evaluated(model, tokenizer, ability, samples, names, limits, seed)
        for ability, samples in targets.items()
    }


class _Limits(NamedTuple):
    max_length: int
    max_new_tokens: int
    batch_tokens: int


def _evaluated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ability: str,
    samples: Sequence[Sample],
    names: Mapping[str, str],
    limits: _Limits,
    seed: int,
) -> AbilityResult:
    kept = tokenize_all(samples, tokenizer, max_length=limits.max_length, over_long="drop")
    rows, dropped = kept.rows, set(kept.dropped)
    left = [sample for sample in samples if sample.id not in dropped]
    checker = Checker(seed)
    checks = [_check(checker, sample, names.get(sample.id, names.get(ability, "auto"))) for sample in left]
    targets = _Losses({ability: rows}, pad_id=padding_id(tokenizer), batch_tokens=limits.batch_tokens)
    loss, loss_error = targets.of(model)
    written = generate(
        model,
        tokenizer,
        [_prompt(row) for row in rows],
        max_new_tokens=limits.max_new_tokens,
        batch_tokens=limits.batch_tokens,
    )
    answers = {sample.id: answer for sample, (answer, _) in zip(left, written, strict=True)}
    failed = [sample.id for sample, check in zip(left, checks, strict=True) if not check.passes(answers[sample.id])]
    notes = [f"{len(dropped)} samples over {limits.max_length} tokens were left out."] if dropped else []
    return AbilityResult(
        loss=loss,
        loss_error=loss_error,
        value=wilson(len(left) - len(failed), len(left)),
        number=len(left),
        checks=dict(Counter(check.name for check in checks)),
        unfinished=sum(not ended for _, ended in written),
        failed=failed,
        answers=answers,
        notes=[*notes, *checker.notes],
    )


def _check(checker: Checker, sample: Sample, name: str) -> Check:
    return checker.choose(sample) if name == "auto" else checker.named(name, sample)


def _prompt(row: Row) -> list[int]:
    """The tokens before the response, the opening of the assistant's turn among them: what training conditions on."""
    return row.input_ids[: next(at for at, label in enumerate(row.labels) if label != IGNORED)]


class _Losses(Targets):
    """One target whose loss is wanted without its gradient."""

    @torch.no_grad()
    def of(self, model: nn.Module) -> tuple[float, float]:
        """Give the loss in nats per response token, and its standard error."""
        (ability,) = self.abilities
        sums = torch.zeros(len(self.rows[ability]), dtype=torch.float64)
        with evaluation(model) as device:
            for batch in self._batches(ability, 0, 1):
                sums[batch] = self._row_losses(model, ability, batch, device).double().cpu()
        counts = torch.tensor(self.tokens[ability], dtype=torch.float64)
        return float(sums.sum() / counts.sum()), ratio_error(sums, counts)


def wilson(passed: int, number: int) -> Value:
    """Give the share of `number` that passed, with Wilson's 95 % interval (Wilson, JASA 1927)."""
    if not 0 <= passed <= number or not number:
        raise ValueError(f"of at least 1 answer 0 to all can pass: got {passed} of {number}.")
    z = 1.959963984540054
    share = passed / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return Value(share, max(0.0, middle - half), min(1.0, middle + half))
