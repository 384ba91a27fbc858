"""bergson 2.5.1: its own collector into its own index, projected to 8 x 8 (LoRA) or 12 x 12 (full) numbers a module."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.rivals._base import SIDES, Contestant, folder_bytes
from benchmarks.system.index_case import BATCH_TOKENS, IndexCase, load_model


def contestants(case: IndexCase, place: Path) -> dict[str, Contestant]:
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import extract_peft_target_modules
    from datasets import Dataset

    model = load_model(case)
    targets = extract_peft_target_modules(model) if case.method == "lora" else None
    model.requires_grad_(False)  # as its own worker does: only the embeddings carry the graph
    model.get_input_embeddings().requires_grad_(True)
    lengths = [len(row.input_ids) for row in case.rows]
    data = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in case.rows],
            "labels": [row.labels for row in case.rows],
            "length": lengths,
        }
    )
    side = SIDES[case.method]
    numbers = itertools.count()
    last: list[Path] = []

    def run() -> None:
        config = IndexConfig(
            run_path=str(place / f"bergson-{next(numbers)}"), projection_dim=side, token_batch_size=BATCH_TOKENS
        )
        config.partial_run_path.mkdir(parents=True)
        last.append(config.partial_run_path)
        collect_gradients(
            model,
            data,
            GradientProcessor(projection_dim=side),
            config,
            batches=allocate_batches(lengths, BATCH_TOKENS),
            target_modules=targets,
        )

    def stored() -> float:
        return folder_bytes(last[-1]) / len(case.rows)

    return {"bergson": Contestant(f"bergson build, {side} x {side} a module, float32 index", run, stored)}
