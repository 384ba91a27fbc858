"""What a training step costs with gated adapters, against one LoRA (PEFT) of the same total rank.

    python -m benchmarks.system.gated_step [--hidden 512] [--layers 2] [--batch 8] [--length 256] [--json FILE]

Forward and backward of a Llama with a frozen base, no optimizer: 4 experts of rank 8 and a memory of rank 8 on every
linear layer, against r = 40. `experts frozen`: three tasks are done, and the fourth trains beside them. Ratios are to
the LoRA's step, round by round. `saved_bytes`: what autograd keeps for the backward pass, all storages but weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ratio, rounds, signed, write_rows
from fastsft.adapters import GatedConfig, attach_gated

EXPERTS = ("one", "two", "three", "four")
RANK = 8
KINDS: dict[str, dict[str, Any]] = {
    "gated, sigmoid by prompt": {},
    "gated, softmax by token": {"gate": "softmax", "granularity": "token"},
    "gated, top-2 by prompt": {"gate": "topk"},
    "gated, one-hot by task": {"gate": "one_hot", "granularity": "task"},
    "gated, sigmoid by prompt, experts frozen": {},
}


def make_model(hidden: int, layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=(8 * hidden // 3 + 63) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def make_lora(model: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    total = RANK * (len(EXPERTS) + 1)
    return get_peft_model(model, LoraConfig(r=total, lora_alpha=2 * total, target_modules="all-linear"))


def make_gated(model: Any, name: str) -> nn.Module:
    gated = attach_gated(model, GatedConfig(experts=EXPERTS, rank=RANK, memory_rank=RANK, **KINDS[name]))
    if gated.config.granularity == "task":
        gated.set_task("four")
    if name.endswith("experts frozen"):
        for expert in EXPERTS[:-1]:
            gated.freeze_expert(expert)
    return model


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Count distinct storages that a forward pass keeps, beside parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(size for place, size in found.items() if place not in own)
    del loss
    return total


def race(hidden: int, layers: int, batch_size: int, length: int, vocabulary: int, repeats: int) -> list[dict[str, Any]]:
    ids = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 4] = -100
    batch = {"input_ids": ids, "labels": labels}

    def make() -> Any:
        return make_model(hidden, layers, vocabulary)

    models = {"one LoRA": make_lora(make()), **{name: make_gated(make(), name) for name in KINDS}}

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    variants: dict[str, Callable[[], object]] = {name: lambda m=model: step(m) for name, model in models.items()}
    times = rounds(variants, repeats, warmup=2)
    found = []
    for name, values in times.items():
        against = ratio(values, times["one LoRA"])
        found.append(
            {
                "op": "gated_step",
                "provider": name,
                "shape": f"hidden {hidden}, {layers} layers, batch {batch_size}, T={length}",
                "experts": len(EXPERTS),
                "rank": RANK,
                "median_ms": round(sorted(values)[len(values) // 2], 2),
                "ratio": against.ratio,
                "p20": against.p20,
                "p80": against.p80,
                "repeats": against.repeats,
                "saved_bytes": saved_bytes(models[name], batch),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step with gated adapters against one LoRA.")
    for name, value in (("hidden", 512), ("layers", 2), ("batch", 8), ("length", 256), ("vocabulary", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = race(given.hidden, given.layers, given.batch, given.length, given.vocabulary, given.repeats)
    for row in found:
        print(
            f"{row['provider']:42} {row['median_ms']:9.1f} ms  {row['ratio']:.3f} of one LoRA [{row['p20']:.3f}, "
            f"{row['p80']:.3f}]  keeps {row['saved_bytes'] / 2**20:.1f} MiB"
        )
    if given.json:
        write_rows(given.json, signed(found))


if __name__ == "__main__":
    main()
