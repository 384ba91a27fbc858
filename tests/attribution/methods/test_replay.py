"""A run taken again in plain steps against torch's own optimizers."""

import pytest
import torch
from torch import nn

from fastsft.attribution.methods._optimizer_steps import AdamW, Sgd, State, clip_back, clip_factor
from fastsft.attribution.methods._replay import Replay, Schedule
from fastsft.data import collate
from fastsft.sketch.passes import Batching
from tests.attribution._support import make_rows, tiny_model

SAMPLES = [*make_rows(5, source="one", seed=1), *make_rows(5, source="three", seed=2)]
# sample 2 twice in one step, sample 9 never
BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 2], [1, 8, 0], [2, 2, 4], [5, 3, 7]]
RATES = [0.01, 0.02, 0.02, 0.015, 0.01, 0.005]


def in_float64(model):
    """Compute norms in the model's own type: transformers' go through float32, which no finite difference survives."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def make_model(*, lora: bool):
    """A tiny model in float64, its adapters (if any) no longer at B = 0."""
    model = in_float64(tiny_model(lora=lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def half_decay(model, rate=0.3):
    """Weight decay of every second parameter."""
    return dict.fromkeys(list(trainable(model))[::2], rate)


def torch_optimizer(model, schedule):
    decay = schedule.weight_decay
    groups = [
        {"params": [p], "weight_decay": decay if isinstance(decay, float) else decay.get(name, 0.0)}
        for name, p in trainable(model).items()
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=schedule.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=schedule.betas, eps=schedule.eps)


def summed_losses(model, rows):
    """Each row's loss, summed over its tokens [n]."""
    batch = collate(rows, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1)


def train(model, samples, schedule, weights=None, normaliser="fixed"):
    """Run the schedule by torch's own optimizer, sample i's loss times weights[i]; returns each step's norm."""
    weights = torch.ones(len(samples), dtype=torch.float64) if weights is None else weights
    optimizer, norms = torch_optimizer(model, schedule), []
    for batch, rate in zip(schedule.batches, schedule.learning_rate, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        counted = sum((weights[at] if normaliser == "weighted" else 1.0) * samples[at].num_supervised for at in batch)
        (summed_losses(model, [samples[at] for at in batch]) @ weights[batch] / counted).backward()
        most = torch.inf if schedule.max_grad_norm is None else schedule.max_grad_norm
        norms.append(float(nn.utils.clip_grad_norm_(list(trainable(model).values()), most)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def replay(model, schedule, *, keep_bytes=2**30, batching=None, smooth=0.0):
    return Replay(model, SAMPLES, schedule, batching=batching or Batching(), keep_bytes=keep_bytes, smooth=smooth)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_replay_is_the_run(optimizer, lora):
    model = make_model(lora=lora)
    schedule = Schedule(
        batches=BATCHES,
        learning_rate=RATES,
        optimizer=optimizer,
        momentum=0.8,
        weight_decay=half_decay(model),
        max_grad_norm=3.0,
    )
    final = replay(make_model(lora=lora), schedule).final
    norms = train(model, SAMPLES, schedule)
    assert min(norms) < 3.0 < max(norms)  # clipped in some steps, not in others
    wanted = torch.cat([parameter.detach().flatten() for parameter in trainable(model).values()])
    torch.testing.assert_close(final, wanted, rtol=1e-12, atol=1e-13)


def test_segments_and_small_batches_walk_back_through_the_same_states():
    schedule = Schedule(batches=BATCHES, learning_rate=RATES, weight_decay=0.1, max_grad_norm=3.0)
    whole = replay(make_model(lora=True), schedule)
    one = whole.final.numel() * 8
    walks = [list(whole.back())]
    for keep_bytes, batching in ((13 * one, None), (0, None), (2**30, Batching(max_tokens=1))):
        part = replay(make_model(lora=True), schedule, keep_bytes=keep_bytes, batching=batching)
        torch.testing.assert_close(part.final, whole.final, rtol=1e-12, atol=1e-13)
        walks.append(list(part.back()))
        assert (part.every > 1) == (keep_bytes < 2**30)
    for walk in walks:
        assert [step.number for step in walk] == [5, 4, 3, 2, 1, 0]
        for step, wanted in zip(walk, walks[0], strict=True):
            for found, kept in zip((*step.state, step.gradient), (*wanted.state, wanted.gradient), strict=True):
                torch.testing.assert_close(found, kept, rtol=1e-10, atol=1e-13)


def test_a_segment_fits_the_bytes_it_was_given():
    schedule = Schedule(batches=[[0]] * 20, learning_rate=[0.0] * 20)
    made = replay(make_model(lora=True), schedule)
    one = made.final.numel() * 8
    assert made._every(3, 80 * one) == 1
    assert made._every(3, 79 * one) == 2  # 10 states of 3, and 2 steps of 4
    assert made._every(3, 35 * one) == 3  # 7 states of 3, and 3 steps of 4
    assert made._every(3, 0) in (3, 4)  # nothing fits: the least


@pytest.mark.parametrize("rule", ["adamw", "smooth", "sgd"])
def test_adjoints_go_back_as_autograd_takes_them(rule):
    decay = torch.rand(7, dtype=torch.float64)
    made = Sgd(decay, 0.9) if rule == "sgd" else AdamW(decay, 0.9, 0.99, 1e-6, 0.3 if rule == "smooth" else 0.0)
    start = made.start(torch.randn(7, dtype=torch.float64))
    for count in (1, 2):
        start = made.step(start, torch.randn(7, dtype=torch.float64), 0.1, count)
    inputs = [each.clone().requires_grad_() for each in start if each is not None]
    gradient = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def smoothed(state, gradient):
        first, second = made._moments(state, gradient)
        root = (second / (1 - 0.99**3) + 0.3).sqrt() + 1e-6
        return State(state.weights * (1 - 0.1 * decay) - 0.1 / (1 - 0.9**3) * first / root, first, second)

    after = smoothed(State(*inputs), gradient) if rule == "smooth" else made.step(State(*inputs), gradient, 0.1, 3)
    outputs = [each for each in after if each is not None]
    adjoints = [torch.randn(2, 7, dtype=torch.float64) for _ in outputs]
    before, of_gradient = made.back(start, gradient.detach(), 0.1, 3, State(*adjoints))
    wanted = torch.autograd.grad(outputs, [*inputs, gradient], adjoints, is_grads_batched=True)
    for found, each in zip([*(b for b in before if b is not None), of_gradient], wanted, strict=True):
        torch.testing.assert_close(found, each)


def test_what_never_had_a_gradient_stays_finite():
    made = AdamW(torch.zeros(3), 0.9, 0.999, 1e-8)
    adjoint = State(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3))
    before, of_gradient = made.back(made.start(torch.ones(3)), torch.zeros(3), 0.1, 1, adjoint)
    assert all(each.isfinite().all() for each in (*before, of_gradient))


def test_clipping_goes_back_as_autograd_takes_it():
    gradient = torch.randn(9, dtype=torch.float64, requires_grad=True)
    adjoint = torch.randn(2, 9, dtype=torch.float64)
    for most in (0.5, 100.0):
        factor = clip_factor([gradient[:4], gradient[4:]], most)
        (wanted,) = torch.autograd.grad(gradient * factor, gradient, adjoint, is_grads_batched=True)
        torch.testing.assert_close(clip_back(gradient.detach(), most, factor.detach(), adjoint), wanted)


def test_a_schedule_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match="1 rates for 2 steps"):
        Schedule(batches=[[0], [1]], learning_rate=[0.1])
    with pytest.raises(ValueError, match="smallest of 0 samples"):
        Schedule(batches=[[0], []], learning_rate=[0.1, 0.1])
    with pytest.raises(ValueError, match="'lion'"):
        Schedule(batches=[[0]], learning_rate=[0.1], optimizer="lion")
    with pytest.raises(ValueError, match="betas"):
        Schedule(batches=[[0]], learning_rate=[0.1], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="max_grad_norm"):
        Schedule(batches=[[0]], learning_rate=[0.1], max_grad_norm=0.0)
    model = make_model(lora=True)
    with pytest.raises(ValueError, match="places from 0 to 10, and there are 10 samples"):
        replay(model, Schedule(batches=[[0, 10]], learning_rate=[0.1]))
    with pytest.raises(ValueError, match="`weight_decay` names nothing"):
        replay(model, Schedule(batches=[[0]], learning_rate=[0.1], weight_decay={"nothing": 0.1}))
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        replay(tiny_model(lora=True, dtype=torch.bfloat16), Schedule(batches=[[0]], learning_rate=[0.1]))
