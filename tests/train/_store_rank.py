"""One rank that keeps a store: `python -m tests.train._store_rank OUT BATCH`, with torchrun's environment.

It trains under `attach(store=True)`, then sketches the samples of a finished run in OUT/finished, where there is one.
"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Sampler

import fastsft
from fastsft.data import RowDataset
from tests.train._support import attach, make_lora, make_rows, make_trainer

PER_STEP = 8
# samples 0 and 1 stand twice in the first step, once on either of two processes; 6 twice on one of them
ORDER = [0, 1, 2, 3, 4, 5, 0, 1, 6, 6, *range(7, 13), *range(13, 21)]


class Given(Sampler):
    def __iter__(self):
        return iter(ORDER)

    def __len__(self):
        return len(ORDER)


def main(out, batch):
    torch.set_num_threads(1)
    trainer = make_trainer(
        out / "trainer",
        make_lora().double(),
        RowDataset(make_rows(21)),
        max_steps=len(ORDER) // PER_STEP,
        per_device_train_batch_size=batch,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        save_strategy="steps",
        save_steps=2,
    )
    trainer._get_train_sampler = lambda dataset=None: Given()
    attach(trainer, out / "run", store=True, sketch_size=256, store_format="bf16", factor="exact")
    trainer.train()
    if (out / "finished").exists():
        store = fastsft.attribute(out / "finished/out", size=256, format="bf16")
        print(f"{store.path.name}: {len(store)}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    # Torch's gloo thread may still free a gathered tensor while the interpreter ends, and aborts (torch 2.13). All is
    # written: leave at once.
    sys.stdout.flush()
    os._exit(0)
