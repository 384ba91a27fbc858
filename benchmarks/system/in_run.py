"""What the books cost a training step: `python -m benchmarks.system.in_run --json FILE`.

A small Llama, batch 8, T=256, three abilities, AdamW; every variant trains its own copy of one model, in turn, on one
thread. A step is forward, backward and optimizer. Refreshes are timed on a line of their own.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import interleave, signed, write_rows
from fastsft import ops
from fastsft.attribution import Attribution, Books, Targets
from fastsft.capturing import Capture, Documents
from fastsft.data import Row
from fastsft.record import Record

SOURCES = ["red", "blue", "green"]


def make_model(hidden: int, layers: int, vocabulary: int, *, lora: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model


class Race:
    """One variant: its own copy of the model, its optimizer, and what watches it."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, settings: Attribution | None) -> None:
        self.model = copy.deepcopy(model).to(args.device)
        self.args = args
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, args.vocabulary, (args.batch, args.length), generator=generator).to(args.device)
        self.names = [f"sample-{index}" for index in range(args.batch)]
        self.books: Books | None = None
        if settings is not None:
            rows = torch.randint(1, args.vocabulary, (args.target_rows, args.length), generator=generator).tolist()
            held = [Row(str(n), "held", row, [-100] * 128 + row[128:]) for n, row in enumerate(rows)]
            self.books = Books(
                self.model,
                self.optimizer,
                Targets(dict.fromkeys(("maths", "code", "general"), held), pad_id=0, batch_tokens=2048),
                sources=SOURCES,
                record=Record.create(Path(args.place) / str(id(self))),
                settings=settings,
            )

    def loss(self) -> Tensor:
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.bf16):
            loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss

    def step(self) -> None:
        if self.books is None:
            self.loss().backward()
        else:
            sources = [SOURCES[index % 3] for index in range(self.args.batch)]
            with self.books.batch(rows=tuple(self.ids.shape), samples=self.names, sources=sources):
                self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm(self) -> None:
        """Past the warm steps, and a refresh: what is timed is the run's steady state."""
        for _ in range(12):
            self.step()
            if self.books is not None:
                self.books.after_step()


def bare_hooks(model: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    race = Race(model, args, None)
    watcher = Capture(race.model)
    documents = Documents.rows(args.batch, args.length)

    def step() -> None:
        with watcher.batch(documents):
            race.loss().backward()
        race.optimizer.step()
        race.optimizer.zero_grad()

    race.warm()
    return step


def materialised(model: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    """The usual way: every per-sample gradient in memory, scaled by Adam, dotted with three target gradients."""
    race = Race(model, args, None)
    grads: dict[int, Tensor] = {}
    watcher = Capture(race.model)
    targets = [torch.randn(3, layer.weight.numel(), device=args.device) for layer in watcher.layers]
    documents = Documents.rows(args.batch, args.length)

    def keep(index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        grads[index] = ops.document_grads(x, dy, documents.offsets)

    watcher.sink = keep

    def step() -> None:
        with watcher.batch(documents):
            race.loss().backward()
        race.optimizer.step()
        with torch.no_grad():
            total = torch.zeros(args.batch, 3, device=args.device)
            for index, layer in enumerate(watcher.layers):
                scale = race.optimizer.state[layer.weight]["exp_avg_sq"].sqrt().add_(1e-8)
                total += (grads.pop(index) / scale).flatten(1) @ targets[index].T
        race.optimizer.zero_grad()

    race.warm()
    return step


def race(method: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Time one method's variants in turn -> rows with the ratio to the plain step, and the refresh's cost."""
    model = make_model(args.hidden, args.layers, args.vocabulary, lora=method == "lora")
    settings: dict[str, Attribution | None] = {"plain step": None}
    if method == "lora":
        settings["books: ledger"] = Attribution(samples=False)
        settings["books: ledger and samples"] = Attribution()
    else:
        settings["books: samples by factors, C=16"] = Attribution(exact=None, rank=16)
        settings["books: ledger and samples, exact"] = Attribution()
    races = {name: Race(model, args, given) for name, given in settings.items()}
    for each in races.values():
        each.warm()
    variants: dict[str, Callable[[], object]] = {name: each.step for name, each in races.items()}
    variants["bare hooks"] = bare_hooks(model, args)
    variants["per-sample gradients materialised"] = materialised(model, args)
    rows = interleave(variants, repeats=args.repeats, warmup=1, device=args.device)
    plain = float(str(rows[0]["median_ms"]))
    for row in rows:
        row["ratio"] = round(float(str(row["median_ms"])) / plain, 4)
        row["ratio_p20"] = round(float(str(row["p20_ms"])) / plain, 4)
        row["ratio_p80"] = round(float(str(row["p80_ms"])) / plain, 4)
    rows.append(refresh_row(races[next(reversed(races))], plain, args))
    shape = {key: getattr(args, key) for key in ("hidden", "layers", "vocabulary", "batch", "length", "target_rows")}
    case = {"op": "system.in_run", "mode": method, "dtype": "bf16 autocast" if args.bf16 else "float32", "case": shape}
    return [{**case, **row} for row in rows]


def refresh_row(measured: Race, plain: float, args: argparse.Namespace) -> dict[str, object]:
    """Time one refresh (targets forward and backward, the interval closed), and its share of a step at the default."""
    books = measured.books
    assert books is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured.step()
    began = time.process_time()
    books.refresh()
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.process_time() - began
    torch.set_num_threads(threads)
    every = Attribution().refresh_every
    return {
        "provider": f"refresh, {3 * args.target_rows} target rows",
        "median_ms": round(seconds * 1e3, 2),
        "repeats": 1,
        "ratio": round(seconds * 1e3 / plain, 4),
        "amortised": round(seconds * 1e3 / plain / every, 4),
        "refresh_every": every,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step with and without the books.")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target-rows", type=int, default=16, help="target rows an ability")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as args.place:
        rows = signed([row for method in args.methods for row in race(method, args)], args.device)
    for row in rows:
        spread = (
            f"[{row['ratio_p20']:.3f}, {row['ratio_p80']:.3f}]"
            if "ratio_p20" in row
            else f"{row['amortised']:.3f} of a step at the default of every {row['refresh_every']}"
        )
        print(f"{row['mode']:5} {row['provider']:38} {row['median_ms']:9.1f} ms  ratio {row['ratio']:.3f}  {spread}")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
