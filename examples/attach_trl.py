"""Attach the books to TRL's SFTTrainer: python examples/attach_trl.py MODEL ROWS.jsonl.gz VALIDATION.jsonl.gz

Any causal language model, any rows with `prompt`, `response`, `id` and `source`; FASTSFT_DATA has maths/gsm8k, for one.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import fastsft

model, train, validation = sys.argv[1:4]
rows = load_dataset("json", data_files={"train": train, "validation": validation})
rows = rows.rename_column("response", "completion").select_columns(["id", "source", "prompt", "completion"])

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="runs/trl/checkpoints",
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_length=384,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    ),
    train_dataset=rows["train"].select(range(400)),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
run = fastsft.attach(
    trainer,
    targets={"held out": rows["validation"].select(range(16))},
    out="runs/trl",
    settings=fastsft.Attribution(tokens=True),
)
trainer.train()
print(run.report())
