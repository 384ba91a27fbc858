"""What is forgotten when tasks are learnt one after another: gated adapters against one LoRA of the same total rank.

    python -m benchmarks.system.forgetting [--setting letters|real] [--arm ARM] [--seeds 5] [--json FILE]

Three tasks in turn, each with an optimizer of its own, none seen again. After each the losses of all tasks so far are
measured on held-out rows. Each arm takes the learning rate that did best for it (mean loss of the three tasks at the
end) on a seed of its own. `letters` is made up, in seconds; `real` is maths (gsm8k), SQL (wikisql) and instructions for
a model of 4 M parameters.

Arms: "one LoRA"; "gated by task": one-hot gates, the task's name is told; "gated by prompt": a sigmoid of the prompt
decides, routers are protected after each task, and later experts begin at a gate of 0.12. The last two freeze an expert
when its task is done, and have a memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import signed, write_rows
from fastsft.adapters import Gated, GatedConfig, attach_gated

ARMS = ("one LoRA", "gated by task", "gated by prompt")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEARCH_SEED = 100
RANK, MEMORY = 4, 4
LATER_BIAS = -2.0
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Tasks in order: a fresh base model by seed, batches of a task by a generator, held-out batches of it."""

    name: str
    tasks: Sequence[str]
    steps: int
    base: Callable[[int], nn.Module]
    batch: Callable[[str, torch.Generator], Batch]
    held_out: Callable[[str], list[Batch]]


def letters(steps: int = 60) -> Setting:
    """A marker and four letters; the answer is the letters shifted by the task's own amount, or also turned round."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tasks = ("first", "second", "third")

    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.2,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def batch(task: str, generator: torch.Generator, rows: int = 32) -> Batch:
        number = tasks.index(task)
        asked = torch.randint(32, (rows, 4), generator=generator)
        answer = (asked + 5 * (number + 1)) % 32
        answer = answer.flip(1) if number % 2 else answer
        ids = torch.cat([torch.full((rows, 1), number), asked + 8, answer + 8], 1)
        labels = ids.clone()
        labels[:, :5] = -100
        return {"input_ids": ids, "labels": labels}

    def held_out(task: str) -> list[Batch]:
        return [batch(task, torch.Generator().manual_seed(99), 64)]

    return Setting(name="letters", tasks=tasks, steps=steps, base=base, batch=batch, held_out=held_out)


def real(steps: int = 30, rows: int = 8) -> Setting:
    """Maths, then SQL, then instructions, for the base model of the shared data after 11 % of its pretraining."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from benchmarks.system.lds_case import LONGEST, data_folder
    from fastsft.data import Row, collate, read_source, tokenize_all

    logging.disable_progress_bar()
    folder = data_folder()
    places = {"maths": "maths/gsm8k", "code": "code/wikisql", "general": "general/rasbt_instructions"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "base-model")

    def read(task: str, split: str, limit: int) -> list[Row]:
        found = read_source(task, folder / places[task] / f"{split}.jsonl.gz", limit=limit)
        return tokenize_all(found, tokenizer, max_length=LONGEST, over_long="drop").rows

    train = {task: read(task, "train", 800) for task in places}
    held = {task: read(task, "validation", 48) for task in places}

    def base(seed: int) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder / "base-model/checkpoint-192", dtype=torch.float32)
        model.config.use_cache = False
        return model

    def batch(task: str, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(train[task]), (rows,), generator=generator).tolist()
        return collate([train[task][at] for at in chosen], tokenizer.pad_token_id)

    def held_out(task: str) -> list[Batch]:
        return [collate(held[task][at : at + 16], tokenizer.pad_token_id) for at in range(0, len(held[task]), 16)]

    return Setting(name="real", tasks=tuple(places), steps=steps, base=base, batch=batch, held_out=held_out)


class Learner:
    """One arm at work on one base model."""

    def __init__(self, arm: str, setting: Setting, seed: int, rate: float) -> None:
        self.arm, self.setting, self.rate = arm, setting, rate
        self.gated: Gated | None = None
        self.model: Any = setting.base(seed)
        first = setting.tasks[0]
        if arm == "one LoRA":
            from peft import LoraConfig, get_peft_model

            total = RANK * len(setting.tasks) + MEMORY
            torch.manual_seed(seed)
            self.model = get_peft_model(
                self.model,
                LoraConfig(r=total, lora_alpha=2 * total, target_modules="all-linear", task_type="CAUSAL_LM"),
            )
        else:
            by_name = arm == "gated by task"
            config = GatedConfig(
                experts=[first],
                rank=RANK,
                memory_rank=MEMORY,
                gate="one_hot" if by_name else "sigmoid",
                granularity="task" if by_name else "sequence",
                orthogonal=not by_name,
                seed=seed,
            )
            self.gated = attach_gated(self.model, config)

    def tell(self, task: str) -> None:
        if self.gated is not None and self.gated.config.granularity == "task":
            # a task that is yet to come has no gates: nothing is trained then, and any expert says nothing
            self.gated.set_task(task if task in self.gated.tasks else self.gated.tasks[0])

    def groups(self) -> list[dict[str, Any]]:
        if self.gated is not None:
            return self.gated.parameter_groups(self.rate)
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": self.rate}]

    def learn(self, task: str, seed: int) -> None:
        """Train on one task; an expert of its own is added for it, and frozen after it."""
        if self.gated is not None and task not in self.gated.experts:
            # under protected routers a new expert's voice on what was seen before is its bias alone
            self.gated.add_expert(task, gate_bias=LATER_BIAS if self.gated.config.orthogonal else None)
        self.tell(task)
        self.model.train()
        optimizer = torch.optim.AdamW(self.groups(), weight_decay=0.0)
        generator = torch.Generator().manual_seed(10 * seed + list(self.setting.tasks).index(task))
        for _ in range(self.setting.steps):
            self.model(**self.setting.batch(task, generator)).loss.backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if self.gated is not None:
            self.gated.freeze_expert(task)
            if self.gated.config.orthogonal:
                self.gated.protect_router()

    @torch.no_grad()
    def loss(self, task: str) -> float:
        """Nats per response token on held-out rows."""
        self.tell(task)
        self.model.eval()
        nats = tokens = 0.0
        for batch in self.setting.held_out(task):
            count = int((batch["labels"][:, 1:] != -100).sum())
            nats += float(self.model(**batch).loss) * count
            tokens += count
        return nats / tokens


def race(arm: str, setting: Setting, seed: int, rate: float) -> dict[str, Any]:
    """Learn the tasks in turn -> losses after each of them, and what they come to."""
    learner = Learner(arm, setting, seed, rate)
    before = {task: learner.loss(task) for task in setting.tasks}
    losses: dict[str, dict[str, float]] = {}
    for number, task in enumerate(setting.tasks):
        learner.learn(task, seed)
        losses[task] = {seen: round(learner.loss(seen), 4) for seen in setting.tasks[: number + 1]}
    first, last = setting.tasks[0], setting.tasks[-1]
    end = losses[last]
    earlier = setting.tasks[:-1]
    return {
        "op": "forgetting",
        "setting": setting.name,
        "arm": arm,
        "seed": seed,
        "steps": setting.steps,
        "learning_rate": rate,
        "before": {task: round(loss, 4) for task, loss in before.items()},
        "losses": losses,
        "first_when_learnt": losses[first][first],
        "first_at_the_end": end[first],
        "mean_at_the_end": round(sum(end.values()) / len(end), 4),
        "forgotten": round(sum(end[task] - losses[task][task] for task in earlier) / len(earlier), 4),
    }


def best_rate(arm: str, setting: Setting) -> float:
    """The learning rate that leaves the lowest mean loss at the end, on a seed that is not reported."""
    return min(RATES, key=lambda rate: race(arm, setting, SEARCH_SEED, rate)["mean_at_the_end"])


def rows(setting: Setting, seeds: int, arms: Sequence[str]) -> Iterator[dict[str, Any]]:
    for arm in arms:
        rate = best_rate(arm, setting)
        for seed in range(seeds):
            yield race(arm, setting, seed, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tasks learnt one after another, and what is left of the first.")
    parser.add_argument("--setting", action="append", choices=["letters", "real"])
    parser.add_argument("--arm", action="append", choices=ARMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in arguments.setting or ["letters", "real"]:
        for row in rows({"letters": letters, "real": real}[name](), arguments.seeds, arguments.arm or ARMS):
            found.append(row)
            print(
                f"{row['setting']:8} {row['arm']:16} seed {row['seed']} rate {row['learning_rate']:g}: the first task "
                f"{row['first_when_learnt']:.3f} -> {row['first_at_the_end']:.3f}, all {row['mean_at_the_end']:.3f}",
                flush=True,
            )
            if arguments.json:
                write_rows(arguments.json, signed(found))


if __name__ == "__main__":
    main()
