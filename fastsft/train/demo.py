"""`fastsft demo`: the whole job on a small generated world with planted truths."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tqdm import tqdm

from fastsft.attribution import Attribution
from fastsft.data import make_world, small_model, tokenize_all, train_base
from fastsft.record import Record, write_text
from fastsft.train.attach import Run
from fastsft.train.config import RunConfig, SourceConfig, TrainConfig
from fastsft.train.loop import Prepared, fine_tune

LONGEST = 96


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
    generated = SourceConfig(path="generated")
    steps = max(1, len(rows) * (1 if quick else 2) // 16)
    config = RunConfig(
        model="demo world's base",
        sources=dict.fromkeys(world.sources, generated),
        targets=dict.fromkeys(world.targets, generated),
        out=str(out),
        train=TrainConfig(rank=8, steps=steps, learning_rate=2e-3, max_length=LONGEST, seed=seed, save_every=10**6),
        attribution=Attribution(refresh_every=refresh_every, seed=seed),
    )
    write_text(Path(out) / "planted.json", json.dumps(dataclasses.asdict(world.planted), indent=1))
    return fine_tune(config, Prepared(samples, rows, targets, data, []), model, tokenizer, out=Path(out))
