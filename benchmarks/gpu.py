"""Build, test and time every GPU kernel in one command: `python -m benchmarks.gpu --out FOLDER [--only NAME]`.

Needs nvcc and an installed torch, triton, ninja and pybind11; nothing is downloaded. Writes FOLDER/gpu.jsonl, a row a
case: median time on the device, its floor (the larger of bytes over the measured bandwidth and FLOPs over the measured
bf16 rate) and the share of the floor that was reached. Cases: one layer of width 4096, 8 samples of 2048 tokens, bf16;
gated adapters at the sizes in their rows; a store of 1,048,576 rows of 4096 numbers.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import ROOT, Bandwidth, bandwidth, gemm_rate, rounds, signed, write_rows
from fastsft import ops

TESTS = (
    "gated_adapter",
    "gated_adapter_running",
    "influence_dot",
    "native",
    "sample_grad_project",
    "sjlt",
    "sketch_matrix",
    "store_topk",
)
WIDTH, DOCUMENTS, TOKENS, SKETCH, RANK = 4096, 8, 2048, 4096, 16
EXPERTS, TOP_K = 8, 2
# of sequences packed together, 8192 tokens: from an answer of a line to a long document
LENGTHS = (1500, 64, 910, 333, 2047, 128, 700, 41, 1100, 512, 257, 600)
Case = Iterator[dict[str, object]]
CASES: dict[str, Callable[["Machine"], Case]] = {}


class Machine:
    """What this machine can do, measured."""

    def __init__(self) -> None:
        self.bandwidth: Bandwidth = bandwidth("cuda")
        self.rate = gemm_rate("cuda", torch.bfloat16)

    def floor_ms(self, bytes_moved: float, flops: float = 0.0) -> float:
        return max(bytes_moved / self.bandwidth.copy, flops / self.rate) * 1e3


def case(function: Callable[[Machine], Case]) -> Callable[[Machine], Case]:
    CASES[function.__name__] = function
    return function


def row(name: str, provider: str, times: list[float], floor_ms: float | None, **more: object) -> dict[str, object]:
    ordered = sorted(times)
    median = ordered[len(ordered) // 2]
    found: dict[str, object] = {
        "op": "gpu",
        "case": name,
        "provider": provider,
        "median_ms": round(median, 4),
        "p20_ms": round(ordered[len(ordered) // 5], 4),
        "p80_ms": round(ordered[-1 - len(ordered) // 5], 4),
        "repeats": len(times),
    }
    if floor_ms is not None:
        found |= {"floor_ms": round(floor_ms, 4), "share_of_floor": round(floor_ms / median, 3)}
    return found | more


def layer_tokens() -> tuple[Tensor, Tensor, Tensor]:
    T = DOCUMENTS * TOKENS
    x, dy = (torch.randn(T, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return x, dy, torch.arange(DOCUMENTS + 1, device="cuda") * TOKENS


@case
def projection(machine: Machine) -> Case:
    """Project one layer's per-sample gradients to 4096 numbers, nothing else."""
    x, dy, offsets = layer_tokens()
    floors = {
        # both sides read once
        "factored": machine.floor_ms(2 * x.numel() * 2),
        "kronecker": machine.floor_ms(2 * x.numel() * 2, 4 * x.numel() * 64),
        "sjlt": machine.floor_ms(2 * x.numel() * 2, 2 * x.numel() * WIDTH),
    }
    variants = {
        kind: lambda kind=kind: ops.sample_grad_project(x, dy, offsets, SKETCH, kind=kind, seed=1) for kind in floors
    }
    scale = torch.rand(WIDTH, WIDTH, device="cuda") + 0.5
    variants["sjlt preconditioned"] = lambda: ops.sample_grad_project(
        x, dy, offsets, SKETCH, seed=1, precondition=scale
    )
    floors["sjlt preconditioned"] = floors["sjlt"]
    for name, times in rounds(variants, repeats=15, device="cuda").items():
        yield row("projection", name, times, floors[name], aim_ms=0.15 if name == "factored" else None)


class _Projecting(torch.autograd.Function):
    """A linear layer whose per-sample products give its weight gradient, and a sketch on the way."""

    @staticmethod
    def forward(ctx, x, weight, offsets):
        ctx.save_for_backward(x, weight, offsets)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight, offsets = ctx.saved_tensors
        total = torch.zeros_like(weight)
        ops.sample_grad_project(x, dy, offsets, SKETCH, seed=1, weight_grad=total)
        return dy @ weight, total, None


@case
def replacing(machine: Machine) -> Case:
    """A layer's training step with a sketch of every sample's gradient, whose products replace the weight gradient."""
    x, dy, offsets = layer_tokens()
    weight = (torch.randn(WIDTH, WIDTH, device="cuda") / 64).to(torch.bfloat16).requires_grad_()
    x.requires_grad_()
    floor = machine.floor_ms(0, 6 * x.numel() * WIDTH)

    def plain() -> None:
        torch.autograd.grad(x @ weight.T, (x, weight), dy)

    def ours() -> None:
        torch.autograd.grad(_Projecting.apply(x, weight, offsets), (x, weight), dy)

    times = rounds({"plain": plain, "with sketches": ours}, repeats=15, device="cuda")
    plain_ms = sorted(times["plain"])[len(times["plain"]) // 2]
    for name, values in times.items():
        ratio = sorted(values)[len(values) // 2] / plain_ms
        yield row("replacing", name, values, floor, ratio=round(ratio, 3), aim=1.10 if name != "plain" else None)


@case
def flat_sketch(machine: Machine) -> Case:
    """Blocked SJLT of flat vectors against torch's index_add_."""
    index, sign = ops.sjlt_table((WIDTH, WIDTH), SKETCH, 1, "cuda")
    out = torch.zeros(DOCUMENTS, SKETCH, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        matrices = torch.randn(DOCUMENTS, WIDTH, WIDTH, device="cuda", dtype=dtype)
        variants = {
            "cuda": lambda m=matrices: ops.sketch_matrix(m, SKETCH, 1),
            "index_add_": lambda m=matrices: out.index_add_(1, index, m.flatten(1).float() * sign),
        }
        floor = machine.floor_ms(matrices.numel() * matrices.element_size())
        for name, times in rounds(variants, repeats=9, device="cuda").items():
            yield row("flat_sketch", name, times, floor, dtype=str(dtype).removeprefix("torch."))


@case
def influence(machine: Machine) -> Case:
    """influence_dot of a LoRA layer (rank 16, three abilities) as a share of the layer's step, the base frozen."""
    x, dy, offsets = layer_tokens()
    weight = (torch.randn(WIDTH, WIDTH, device="cuda") / 64).to(torch.bfloat16)
    a = torch.randn(RANK, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    b = torch.randn(WIDTH, RANK, device="cuda", dtype=torch.bfloat16).requires_grad_()
    x.requires_grad_()
    targets_a = torch.randn(3, RANK, WIDTH, device="cuda")
    targets_b = torch.randn(3, WIDTH, RANK, device="cuda")
    h, dz = (x @ a.T).detach(), dy @ b.detach()

    def step() -> None:
        torch.autograd.grad(x @ weight.T + (x @ a.T) @ b.T, (x, a, b), dy)

    def scored() -> None:
        step()
        ops.influence_dot(x, dz, offsets, targets_a)
        ops.influence_dot(h, dy, offsets, targets_b)

    variants = {
        "step": step,
        "step with scores": scored,
        "scores of A": lambda: ops.influence_dot(x, dz, offsets, targets_a),
        "scores of B": lambda: ops.influence_dot(h, dy, offsets, targets_b),
    }
    times = rounds(variants, repeats=15, device="cuda")
    step_ms = sorted(times["step"])[len(times["step"]) // 2]
    floors = {"step": machine.floor_ms(0, 4 * x.numel() * WIDTH), "step with scores": None}
    for name, values in times.items():
        ratio = sorted(values)[len(values) // 2] / step_ms
        floor = floors.get(name, machine.floor_ms(x.numel() * 2))
        aim = 1.05 if name == "step with scores" else None
        yield row("influence", name, values, floor, ratio=round(ratio, 3), aim=aim)


class Gated(NamedTuple):
    """One setting of a gated adapter, and the aim of what runs by default: a ratio of its time to another's."""

    tokens: int
    width: int
    rank: int
    gate: Literal["sigmoid", "topk"]
    per: Literal["token", "sequence"]
    against: str
    aim: float | None
    lengths: tuple[int, ...] | None = None  # None: DOCUMENTS of one length

    def floor_ms(self, machine: Machine, num_experts: int | None) -> float:
        """The layer's tensors once, and its products: of both passes of the base, of the adapter with its own."""
        columns = 0 if num_experts is None else num_experts * self.rank
        # rows of A are the router's too, which is never skipped
        rows = 0 if num_experts is None else columns + EXPERTS
        size = 4 * self.tokens * self.width + 2 * self.width**2
        products = 4 * self.width**2 + 6 * self.width * (rows + columns)
        return machine.floor_ms(2 * size, self.tokens * products)


GATED = (
    Gated(8192, 2048, 64, "topk", "sequence", "stacked", round(1 / 1.3, 3)),
    Gated(8192, 2048, 64, "topk", "sequence", "stacked", None, LENGTHS),
    Gated(1024, 2048, 16, "sigmoid", "token", "stacked", round(1 / 1.5, 3)),
    Gated(256, 2048, 16, "sigmoid", "token", "stacked", round(1 / 1.5, 3)),
    Gated(8192, 4096, 16, "sigmoid", "sequence", "frozen base", 1.2),
)


def gated_variants(setting: Gated) -> dict[str, Callable[[], object]]:
    """Both passes of a frozen layer: alone, with the reference's products of all experts, with what is chosen."""
    shape: tuple[int, ...] = (DOCUMENTS, setting.tokens // DOCUMENTS) if setting.lengths is None else (setting.tokens,)
    width = setting.width
    x, dy = (torch.randn(*shape, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a = torch.randn(EXPERTS * (setting.rank + 1), width, device="cuda", dtype=torch.bfloat16) / width**0.5
    b = torch.randn(width, EXPERTS * setting.rank, device="cuda", dtype=torch.bfloat16) / 64
    leaves = [leaf.requires_grad_() for leaf in (x, a, b)]
    base = torch.nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    prompt = torch.ones(shape, dtype=torch.bool, device="cuda")
    if setting.lengths is None:
        sequences = ops.Sequences.of_rows(prompt)
    else:
        sequences = ops.Sequences.packed(torch.tensor([0, *setting.lengths], device="cuda").cumsum(0), prompt)

    def frozen() -> None:
        torch.autograd.grad(torch.nn.functional.linear(x, base.weight), x, dy)

    def adapted(skip: bool | None) -> None:
        more = {"gate": setting.gate, "per": setting.per, "top_k": TOP_K, "sequences": sequences, "skip": skip}
        y = ops.gated_adapter(x, a, b, base=base, num_experts=EXPERTS, rank=setting.rank, **more)
        torch.autograd.grad(y, leaves, dy)

    def stacked() -> None:
        with ops.backend("reference"):
            adapted(skip=False)

    def by_name() -> None:
        with ops.backend("triton"):
            adapted(skip=None)

    variants: dict[str, Callable[[], object]] = {
        "frozen base": frozen,
        "stacked": stacked,
        "gated_adapter": lambda: adapted(skip=None),
    }
    if setting.gate == "topk":
        variants |= {"with skip": lambda: adapted(skip=True), "without skip": lambda: adapted(skip=False)}
    if setting.lengths is not None:
        variants["triton, by name"] = by_name
    return variants


@case
def gated(machine: Machine) -> Case:
    """gated_adapter of 8 experts on a frozen layer, against the same products stacked in plain torch."""
    for setting in GATED:
        times = rounds(gated_variants(setting), repeats=15, device="cuda")
        against_ms = sorted(times[setting.against])[len(times[setting.against]) // 2]
        chosen = TOP_K if setting.gate == "topk" else EXPERTS
        of = {"frozen base": None, "stacked": EXPERTS, "without skip": EXPERTS}
        if setting.lengths is not None:
            of["gated_adapter"] = EXPERTS  # by default none of packed sequences is skipped
        for name, values in times.items():
            ratio = sorted(values)[len(values) // 2] / against_ms
            aim = setting.aim if name == "gated_adapter" else None
            floor = setting.floor_ms(machine, of.get(name, chosen))
            shape = {"tokens": setting.tokens, "width": setting.width, "experts": EXPERTS, "rank": setting.rank}
            how = {"gate": setting.gate, "per": setting.per, "against": setting.against, "lengths": setting.lengths}
            yield row("gated", name, values, floor, **shape, **how, ratio=round(ratio, 3), aim=aim)


def big_store(format: str, num_rows: int, size: int) -> ops.Rows:
    """Random rows, made a part at a time."""
    parts = []
    for _ in range(0, num_rows, 65536):
        parts.append(ops.encode_rows(torch.randn(65536, size, device="cuda"), format))
    scales = None if parts[0].scales is None else torch.cat([part.scales for part in parts])
    return ops.Rows(format, torch.cat([part.data for part in parts]), scales)


@case
def scan(machine: Machine) -> Case:
    """Exact top-10 of both signs over a store that lies in device memory."""
    num_rows = 2**20
    aims = {("bf16", 1): 2.6, ("bf16", 128): 2.6, ("1bit", 1): 0.3}
    for format in ops.FORMATS:
        rows = big_store(format, num_rows, SKETCH)
        for num_queries in (1, 16, 128):
            queries = torch.randn(num_queries, SKETCH, device="cuda")
            size = rows.data.numel() * rows.data.element_size()
            # int8 products run at twice the rate of bf16
            rate = 1.0 if format == "bf16" else 0.5
            floor = machine.floor_ms(size, 2 * num_rows * SKETCH * num_queries * rate)
            variants: dict[str, Callable[[], object]] = {
                "store_topk": lambda rows=rows, queries=queries: ops.store_topk(queries, rows, 10)
            }
            if format == "bf16":
                variants["torch, chunked"] = lambda rows=rows, queries=queries: torch_scan(rows.data, queries)
            for name, times in rounds(variants, repeats=7, warmup=2, device="cuda").items():
                aim = aims.get((format, num_queries)) if name == "store_topk" else None
                yield row("scan", name, times, floor, format=format, queries=num_queries, aim_ms=aim)
        del rows
        torch.cuda.empty_cache()


def torch_scan(data: Tensor, queries: Tensor, k: int = 10) -> Tensor:
    """Top-k of the largest alone, by a product a chunk."""
    narrow = queries.to(torch.bfloat16).T
    best = [(data[begin : begin + 131072] @ narrow).topk(k, dim=0).values for begin in range(0, len(data), 131072)]
    return torch.cat(best).topk(k, dim=0).values


def build() -> None:
    """Install this checkout, without fetching anything."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    subprocess.run(pip, check=True)


def green() -> bool:
    """Run the operators' tests on the device; those of kernels without one (test_*_triton.py) need none."""
    files = [str(ROOT / f"tests/ops/test_{op}.py") for op in TESTS]
    if importlib.util.find_spec("xdist"):
        files += ["-n", "8"]
    env = os.environ | {"FASTSFT_TEST_DEVICE": "cuda", "FASTSFT_REQUIRE_NATIVE": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, env=env).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, test and time the GPU kernels.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.jsonl")
    parser.add_argument("--only", action="append", choices=sorted(CASES))
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-tests", action="store_true", help="for looking at a kernel; rows are marked")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here.")
    if not arguments.no_build:
        build()
        # What was just installed is found by a process that starts now.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--no-build"])
    # A row of the reference under a kernel's name would be worse than none.
    warnings.filterwarnings("error", message=".*takes its plain torch reference")
    if not arguments.no_tests and not green():
        raise SystemExit("Tests are red: nothing is timed.")
    machine = Machine()
    print(f"copy {machine.bandwidth.copy / 1e12:.2f} TB/s, bf16 products {machine.rate / 1e12:.0f} TFLOP/s")
    rows = []
    for name in arguments.only or CASES:
        for found in CASES[name](machine):
            rows.append(found | ({"tested": False} if arguments.no_tests else {}))
            print(found, flush=True)
        torch.cuda.empty_cache()
        write_rows(arguments.out / "gpu.jsonl", signed(rows, "cuda"))


if __name__ == "__main__":
    main()
