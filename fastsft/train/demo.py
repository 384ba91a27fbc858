"""`fastsft demo`: the whole job on a small generated world with planted truths."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fastsft.attribution import Attribution
from fastsft.data import Sample, make_world, small_model, tokenize_all, train_base
from fastsft.record import Record, write_text
from fastsft.train.attach import Run
from fastsft.train.config import RunConfig, SourceConfig, TrainConfig
from fastsft.train.loop import Prepared, fine_tune

LONGEST = 96
# folder of the run directory that keeps the generated data and the base model
WORLD = "world"


def demo(out: str | Path, *, seed: int = 0, quick: bool = False, refresh_every: int = 10) -> Run:
    """Train a small Llama from scratch on a generated world, fine-tune it with LoRA under attribution, report.

    The world holds wrong answers, duplicates, a useless source and one that helps two abilities; report.json says
    under `planted` how well the books found them. `quick` makes everything smaller.
    """
    Record.create(out)
    world = make_world(seed, quick=quick)
    tokenizer = world.tokenizer()
    model = small_model(tokenizer, seed)
    base = tokenize_all(world.base, tokenizer, max_length=LONGEST, over_long="drop").rows
    steps = 300 if quick else 1000
    with tqdm(total=steps, desc="base model from scratch") as bar:
        train_base(model, base, steps=steps, seed=seed, progress=lambda step, steps, loss: bar.update())

    samples = [sample for source in world.sources.values() for sample in source]
    rows = tokenize_all(samples, tokenizer, max_length=LONGEST).rows
    targets = {
        ability: tokenize_all(held, tokenizer, max_length=LONGEST).rows for ability, held in world.targets.items()
    }
    data = {
        name: {"rows": len(source), "ability": source[0].ability, "path": "generated"}
        for name, source in world.sources.items()
    }
    sources = {name: _save(samples, Path(out), f"{name}.jsonl") for name, samples in world.sources.items()}
    held_out = {name: _save(samples, Path(out), f"held-out-{name}.jsonl") for name, samples in world.targets.items()}
    model.save_pretrained(Path(out) / WORLD / "base")
    tokenizer.save_pretrained(Path(out) / WORLD / "base")
    steps = max(1, len(rows) * (1 if quick else 2) // 16)
    config = RunConfig(
        model=f"{WORLD}/base",
        sources=sources,
        targets=held_out,
        out=str(out),
        # four checkpoints, for methods that score after the run
        train=TrainConfig(
            rank=8, steps=steps, learning_rate=2e-3, max_length=LONGEST, seed=seed, save_every=-(-steps // 4)
        ),
        attribution=Attribution(refresh_every=refresh_every, seed=seed),
    )
    write_text(Path(out) / "planted.json", json.dumps(dataclasses.asdict(world.planted), indent=1))
    prepared = Prepared(samples, rows, targets, data, [])
    return fine_tune(config, prepared, model, tokenizer, out=Path(out), root=Path())


def _save(samples: Sequence[Sample], out: Path, name: str) -> SourceConfig:
    """Write samples where `fastsft attribute` and `search` will read them, and say where that is from `out`."""
    lines = []
    for sample in samples:
        messages = [{"role": role, "content": content} for role, content in sample.messages]
        lines.append(json.dumps({"id": sample.id, "ability": sample.ability, "messages": messages}) + "\n")
    write_text(out / WORLD / name, "".join(lines))
    return SourceConfig(path=f"{WORLD}/{name}")
