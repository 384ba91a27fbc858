"""The books in a training loop of your own: python examples/bare_loop.py MODEL ROWS.jsonl.gz VALIDATION.jsonl.gz"""

import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastsft
from fastsft.data import collate, read_source, tokenize_all

name, train, validation = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=8, target_modules="all-linear"))
model.float().train()
samples = read_source("train", train, limit=160)
rows = tokenize_all(samples, tokenizer, max_length=384, over_long="drop").rows
held_out = tokenize_all(read_source("held out", validation, limit=16), tokenizer, max_length=384, over_long="drop").rows
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

record = fastsft.Record.create("runs/bare")
targets = fastsft.Targets({"held out": held_out}, pad_id=tokenizer.pad_token_id)
books = fastsft.Books(model, optimizer, targets, sources=["train"], record=record, total_steps=20)
record.write_samples((sample.id, sample.source, sample.prompt, sample.response) for sample in samples)
for _ in range(20):
    drawn = random.sample(rows, 8)
    batch = collate(drawn, tokenizer.pad_token_id)
    with books.batch(
        rows=tuple(batch["input_ids"].shape),
        lengths=[[len(row.input_ids)] for row in drawn],
        samples=[row.id for row in drawn],
        sources=[row.source for row in drawn],
    ):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        books.add_loss(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    books.after_step()
books.finish()
print(fastsft.write_report("runs/bare"))
