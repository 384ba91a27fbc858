"""One rank of a run under DDP: `python -m tests.train._one_rank OUT METHOD BATCH`, with torchrun's environment."""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler

from fastsft.data import RowDataset
from tests.train._support import attach, make_lora, make_model, make_rows, make_trainer

STEPS, PER_STEP = 6, 8


def main(out, method, batch):
    torch.set_num_threads(1)
    model = (make_lora() if method == "lora" else make_model()).double()
    trainer = make_trainer(
        out / "trainer",
        model,
        RowDataset(make_rows(STEPS * PER_STEP)),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        adam_epsilon=1e-4,
        weight_decay=0.1,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        save_strategy="steps",
        save_steps=4,
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    run = attach(trainer, out / "run", factor="exact")
    trainer.train()
    rank = int(os.environ.get("RANK", "0"))
    torch.save({name: weight.detach() for name, weight in model.named_parameters()}, out / f"weights-{rank}.pt")
    assert run.books is not None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    # Torch's gloo thread may still free a gathered tensor while the interpreter ends, and aborts (torch 2.13). All is
    # written: leave at once.
    sys.stdout.flush()
    os._exit(0)
