"""Tasks learnt one after another, an expert each: python examples/gated_tasks.py MODEL NAME=TRAIN,VALIDATION ...

For example, with the folder of the shared data as $DATA:
    python examples/gated_tasks.py $DATA/base-model \
        maths=$DATA/maths/gsm8k/train.jsonl.gz,$DATA/maths/gsm8k/validation.jsonl.gz \
        code=$DATA/code/wikisql/train.jsonl.gz,$DATA/code/wikisql/validation.jsonl.gz
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fastsft
from fastsft.data import Row, RowDataset, read_source, tokenize_all

name, *tasks = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
places = dict(task.split("=") for task in tasks)


def rows_of(task: str, path: str, limit: int) -> list[Row]:
    return tokenize_all(read_source(task, path, limit=limit), tokenizer, max_length=384, over_long="drop").rows


targets = {task: rows_of(task, places[task].split(",")[1], 16) for task in places}
first = next(iter(places))
gated = fastsft.attach_gated(model, fastsft.GatedConfig(experts=[first], rank=8, memory_rank=8, orthogonal=True))
for task in places:
    if task not in gated.experts:
        gated.add_expert(task)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(f"runs/gated/{task}/checkpoints", max_steps=20, save_strategy="no", report_to=[]),
        train_dataset=RowDataset(rows_of(task, places[task].split(",")[0], 400)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(gated.parameter_groups(2e-3)), None),  # the memory learns at a tenth of it
    )
    run = fastsft.attach(trainer, targets, out=f"runs/gated/{task}")  # what this task's training did to every task
    trainer.train()
    print(run.report())
    gated.freeze_expert(task)  # its expert stays as it is,
    gated.protect_router()  # and so do the gates of what was seen
print(gated.save("runs/gated/adapters"))
