"""Moments come back by name from every dump that training tools leave, or a sentence says why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsft.attribution.methods._base import Moments
from fastsft.attribution.methods._moments import dequantised, moments_of, read_moments
from fastsft.data import RowDataset, collate
from tests.attribution._support import loss_of, make_rows, tiny_model, trainable
from tests.sketch._support import moved

ROWS = make_rows(4, source="red", seed=1)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> torch.optim.Optimizer:
    for _ in range(steps):
        loss_of(model, ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def trained(*, lora: bool, groups: Callable[[nn.Module], Any] = trainable) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = moved(tiny_model(lora=lora))
    return model, stepped(model, torch.optim.AdamW(groups(model), lr=1e-3))


def same(found: Moments, expected: Moments) -> None:
    assert set(found) == set(expected)
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(found[name][key]), torch.as_tensor(value)), (name, key)


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return {name: {**{k: s[k] for k in ("exp_avg", "exp_avg_sq")}, "step": s["step"]} for name, s in states.items()}


# live


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_live_optimizer_gives_copies_by_name(lora: bool) -> None:
    model, optimizer = trained(lora=lora)
    found = moments_of(model, optimizer)
    same(found, by_hand(model, optimizer))
    assert list(found) == [name for name, p in model.named_parameters() if p.requires_grad]
    before = {name: state["exp_avg"].clone() for name, state in found.items()}
    stepped(model, optimizer, 1)
    assert all(torch.equal(found[name]["exp_avg"], value) for name, value in before.items())


def test_a_live_optimizer_without_steps_or_without_adams_moments_is_refused() -> None:
    model = moved(tiny_model(lora=True))
    with pytest.raises(ValueError, match="AdamW holds no state"):
        moments_of(model, torch.optim.AdamW(trainable(model)))
    with pytest.raises(ValueError, match=r"SGD has no exp_avg of .*momentum_buffer"):
        moments_of(model, stepped(model, torch.optim.SGD(trainable(model), lr=1e-3, momentum=0.9)))


# numbered states


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_trainers_checkpoint(tmp_path: Path, lora: bool) -> None:
    from transformers import Trainer, TrainingArguments

    model = moved(tiny_model(lora=lora, dtype=torch.float32))
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        weight_decay=0.1,
        remove_unused_columns=False,
    )

    def collator(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        return collate([ROWS[item["fastsft_row"]] for item in items], 0)

    trainer = Trainer(model, args, train_dataset=RowDataset(ROWS), data_collator=collator)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert lora or all(len(group["params"]) for group in groups)  # with decay, without: not the model's order
    found = read_moments(tmp_path / "checkpoint-2", model)
    same(found, by_hand(model, trainer.optimizer.optimizer))
    same(read_moments(tmp_path / "checkpoint-2" / "optimizer.pt", model), found)
    assert {state["step"] for state in found.values()} == {2.0}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_one_group_of_trainable_or_of_all_parameters(tmp_path: Path) -> None:
    model, optimizer = trained(lora=True)
    same(read_moments(saved(tmp_path / "a", optimizer.state_dict()), model), by_hand(model, optimizer))
    model, optimizer = trained(lora=True, groups=lambda model: model.parameters())
    same(read_moments(saved(tmp_path / "b", {"optimizer": optimizer.state_dict()}), model), by_hand(model, optimizer))
    model, optimizer = trained(lora=False, groups=lambda model: model.parameters())
    same(read_moments(saved(tmp_path / "c", optimizer.state_dict()), model), by_hand(model, optimizer))


def test_groups_of_ones_own_need_names(tmp_path: Path) -> None:
    def three(model: nn.Module) -> list[dict[str, Any]]:
        found = trainable(model)[::-1]
        return [{"params": found[:3]}, {"params": found[3:5]}, {"params": found[5:]}]

    model, optimizer = trained(lora=True, groups=three)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    path = saved(tmp_path / "optimizer.pt", optimizer.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[3, 2, 23\].*\[28, 0\].*one of 28 or \d+.*`trainable_order`"):
        read_moments(path, model)
    same(read_moments(path, model, trainable_order=names[::-1]), by_hand(model, optimizer))
    with pytest.raises(ValueError, match="numbers 28 parameters, and their order names 27"):
        read_moments(path, model, trainable_order=names[1:])
    with pytest.raises(ValueError, match="names 'nobody', no parameter"):
        read_moments(path, model, trainable_order=[*names[1:], "nobody"])
    with pytest.raises(ValueError, match=r"does not fit this model: its exp_avg of .* has the shape"):
        read_moments(path, model, trainable_order=names)

    def named(model: nn.Module) -> list[dict[str, Any]]:
        pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad][::-1]
        return [{"params": pairs[:3]}, {"params": pairs[3:]}]

    model, optimizer = trained(lora=True, groups=named)  # torch 2.6 and later keep the names then
    same(read_moments(saved(tmp_path / "named", optimizer.state_dict()), model), by_hand(model, optimizer))


# named states


def renamed(model: nn.Module, optimizer: torch.optim.Optimizer, rename: Callable[[str], str]) -> dict[str, Any]:
    names = {p: rename(name) for name, p in model.named_parameters()}
    states = {names[p]: dict(state) for p, state in optimizer.state.items()}
    return {"state": states, "param_groups": [{"params": list(states), "lr": 1e-3}]}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: "_fsdp_wrapped_module." + name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "trainer.policy." + name,
    ],
    ids=["plain", "fsdp", "ddp", "compiled", "without peft's prefix", "inside another"],
)
def test_a_dump_by_name_through_wrappers(tmp_path: Path, rename: Callable[[str], str]) -> None:
    model, optimizer = trained(lora=True)
    saved(tmp_path / "optimizer.bin", renamed(model, optimizer, rename))
    same(read_moments(tmp_path, model), by_hand(model, optimizer))


def test_dumps_of_torch_distributed_whole_sharded_and_flattened(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model, optimizer = trained(lora=True)
    expected = by_hand(model, optimizer)
    whole = get_optimizer_state_dict(model, optimizer)
    same(read_moments(saved(tmp_path / "whole.pt", whole), model), expected)
    dcp.save({"optimizer": whole}, checkpoint_id=tmp_path / "checkpoint" / "optimizer_0", no_dist=True)
    same(read_moments(tmp_path / "checkpoint", model), expected)
    same(read_moments(tmp_path / "checkpoint" / "optimizer_0", model), expected)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    same(read_moments(saved(tmp_path / "flat.pt", flat), model), expected)
    dcp.save({"optimizer": flat}, checkpoint_id=tmp_path / "flat", no_dist=True)
    same(read_moments(tmp_path / "flat", model), expected)


def test_names_that_fit_none_or_several_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(lora=True)
    cases: list[tuple[Callable[[str], str], str]] = [
        (lambda name: name.replace("q_proj", "query"), "fits 0 of them"),
        (lambda name: name.split("layers.0.")[-1], r"fits 2 of them|is a second one of"),
        (lambda name: "lora_A.default.weight" if "0.self_attn.q_proj.lora_A" in name else name, r"fits \d+ of them"),
    ]
    for number, (rename, message) in enumerate(cases):
        path = saved(tmp_path / str(number), renamed(model, optimizer, rename))
        with pytest.raises(ValueError, match=message):
            read_moments(path, model)
    twice = renamed(model, optimizer, lambda name: name)
    first = next(iter(twice["state"]))
    twice["state"]["module." + first] = twice["state"][first]
    with pytest.raises(ValueError, match="is a second one of " + re.escape(first)):
        read_moments(saved(tmp_path / "twice", twice), model)


# bitsandbytes


def quantised(values: Tensor, block: int, *, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A quantiser of that layout: codes of the values' shape, the map [256] and one absmax a block."""
    steps = torch.linspace(0, 1, 128 if signed else 256, dtype=torch.float32) ** 2
    qmap = torch.cat([-steps.flip(0), steps]) if signed else steps
    flat = torch.cat([values.float().flatten(), torch.zeros(-values.numel() % block)]).view(-1, block)
    absmax = flat.abs().amax(1)
    nearest = (flat / absmax.clamp_min(1e-30)[:, None])[..., None].sub(qmap).abs().argmin(-1)
    return nearest.to(torch.uint8).flatten()[: values.numel()].view_as(values), qmap, absmax


@pytest.mark.parametrize("block", [64, 256, 2048])
def test_blockwise_eight_bits_are_decoded(tmp_path: Path, block: int) -> None:
    model = nn.ModuleDict({"large": nn.Linear(70, 90, bias=False), "small": nn.Linear(3, 2, bias=False)})
    generator = torch.Generator().manual_seed(1)
    truth = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    codes, qmap, absmax = quantised(truth["large.weight"] - 0.5, block, signed=True)
    codes2, qmap2, absmax2 = quantised(truth["large.weight"], block, signed=False)
    eight = {"state1": codes, "qmap1": qmap, "absmax1": absmax, "state2": codes2, "qmap2": qmap2, "absmax2": absmax2}
    small = {"state1": truth["small.weight"], "state2": truth["small.weight"] ** 2}
    for number, nested in enumerate([False, True]):  # as early versions wrote them, and as they are wrapped now
        states = [{"__bnb_optimizer_quant_state__": each} if nested else each for each in (eight, small)]
        states = [{**each, "step": 3} for each in states]
        dump = {"state": dict(enumerate(states)), "param_groups": [{"params": [0, 1]}]}
        found = read_moments(saved(tmp_path / str(number), dump), model)
        # half a step of the map, at most 2/128 of a block's largest
        assert (found["large.weight"]["exp_avg"] - (truth["large.weight"] - 0.5)).abs().max() < 0.5 / 127
        assert (found["large.weight"]["exp_avg_sq"] - truth["large.weight"]).abs().max() < 1 / 255
        flat = [qmap[c] * absmax[n // block] for n, c in enumerate(codes.flatten().int().tolist())]
        assert torch.equal(found["large.weight"]["exp_avg"].flatten(), torch.stack(flat))
        assert torch.equal(found["small.weight"]["exp_avg_sq"], truth["small.weight"] ** 2)
        assert found["large.weight"]["step"] == 3.0


def test_eight_bits_without_their_maps_or_with_too_few_blocks_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"large": nn.Linear(70, 90, bias=False)})
    codes, qmap, absmax = quantised(torch.rand(90, 70), 256, signed=False)
    path = saved(
        tmp_path / "bare", {"state": {0: {"state1": codes, "max1": absmax[:1]}}, "param_groups": [{"params": [0]}]}
    )
    with pytest.raises(ValueError, match=r"has no exp_avg of large\.weight.*state1, max1.*blockwise"):
        read_moments(path, model)
    with pytest.raises(ValueError, match="8-bit states of 6300 numbers can't have 24 blocks"):
        dequantised(codes, qmap, absmax[:-1])


def test_a_dump_of_bitsandbytes_itself(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(96, 64, bias=False), nn.Linear(64, 8))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    exact = torch.optim.AdamW(copy := [p.detach().clone().requires_grad_(True) for p in model.parameters()], lr=1e-3)
    for _ in range(2):
        model(torch.randn(4, 96)).pow(2).sum().backward()
        for mine, other in zip(model.parameters(), copy, strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        exact.step()
        optimizer.zero_grad()
    found = read_moments(saved(tmp_path / "optimizer.pt", optimizer.state_dict()), model)
    same(moments_of(model, optimizer), found)
    for (name, _), other in zip(model.named_parameters(), copy, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            truth = exact.state[other][key]
            # 8 bits, twice, in blocks
            assert (found[name][key] - truth).norm() < 0.05 * truth.norm(), (name, key)


# files that are none


def test_folders_and_files_that_hold_no_optimizer_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(lora=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ranks").mkdir()
    saved(tmp_path / "ranks" / "optimizer_0_rank0.bin", {})
    (tmp_path / "text").write_text("no tensors")
    for name, message in [
        ("nowhere", "nowhere holds nothing"),
        ("empty", "empty holds nothing, and no optimizer"),
        ("ranks", r"holds optimizer_0_rank0.bin, and no optimizer.*one file"),
        ("text", "text can't be read as plain tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_moments(tmp_path / name, model)
    with pytest.raises(ValueError, match="holds no optimizer's states"):
        read_moments(saved(tmp_path / "weights", {"weight": torch.zeros(2)}), model)
    state = {number: {"step": 1, "exp_avg_sq_row": torch.zeros(4)} for number in range(28)}
    path = saved(tmp_path / "factored", {"state": state, "param_groups": [{"params": list(range(28))}]})
    with pytest.raises(ValueError, match=r"has no exp_avg of .*exp_avg_sq_row"):
        read_moments(path, model)
    dump = optimizer.state_dict()
    dump["state"][99] = dump["state"][0]
    path = saved(tmp_path / "odd", dump)
    with pytest.raises(ValueError, match="a state 99 that no parameter group numbers"):
        read_moments(path, model)
