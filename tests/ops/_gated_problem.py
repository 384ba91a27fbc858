"""One gated layer on random numbers, and the slow truth beside it: a loop over experts that autograd differentiates."""

from itertools import product

import torch
from torch import nn

from fastsft import ops

# T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank, N tasks

GATES = [
    *product(("sigmoid", "softmax", "topk"), ("token", "sequence", "task")),
    ("one_hot", "task"),
]
# of which a sequence uses some experts alone, so that products of the others can be skipped
SPARSE = [("topk", "sequence"), ("topk", "task"), ("one_hot", "task")]
NUM_TASKS = 4


class Sine(nn.Module):
    """A base that begins with it has gradients that depend on x; one that ends with nn.Tanh keeps its own output."""

    def forward(self, x):
        return x.sin()


class Int8Linear(nn.Module):
    """A frozen layer with int8 weights and a scale a row, turned into numbers again at every call."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(outputs, 1, dtype=torch.float64) / 127)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scales.to(x.dtype))


def make_base(kind, inputs, outputs):
    if kind is None:
        return None
    linear = nn.Linear(inputs, outputs)
    if kind == "curved":
        return nn.Sequential(Sine(), linear, nn.Tanh())
    return Int8Linear(inputs, outputs) if kind == "int8" else linear


class Problem:
    """Random arguments, and what a loop over the experts makes of them. Sequences that are rows make a 3-D x."""

    def __init__(
        self,
        gate="sigmoid",
        per="token",
        *,
        lengths=(4, 0, 3),
        rows=False,
        prompts=None,
        inputs=5,
        outputs=4,
        experts=3,
        rank=2,
        memory=3,
        bias=True,
        base="linear",
        top_k=2,
        one_task=False,
        scale=0.7,
        dtype=torch.float64,
        device="cpu",
    ):
        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_()

        self.gate, self.per, self.top_k, self.rank, self.scale = gate, per, top_k, rank, scale
        self.experts, self.memory, self.width = experts, memory, experts * rank
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        T, D = self.bounds[-1], len(lengths)
        self.prompt = self._prompts([length // 2 for length in lengths] if prompts is None else prompts).to(device)
        offsets = torch.tensor(self.bounds, device=device)
        row = (D, lengths[0] if D else 3)
        self.x = draw(*(row if rows else (T,)), inputs)
        if rows:
            self.sequences = ops.Sequences.of_rows(self.prompt.view(row))
        else:
            self.sequences = ops.Sequences.packed(offsets, self.prompt)
        self.a = draw(self.width + memory + (0 if per == "task" else experts), inputs)
        self.b = draw(outputs, self.width + memory)
        self.bias = draw(experts) if bias and gate != "one_hot" else None
        self.table = draw(NUM_TASKS, experts) if per == "task" and gate != "one_hot" else None
        tasks = torch.arange(1 if one_task else D, device=device)
        self.task = (2 - tasks) % min(experts, NUM_TASKS) if per == "task" else None
        self.base = make_base(base, inputs, outputs)
        if self.base is not None:
            self.base = self.base.to(device, dtype)

    def _prompts(self, counts):
        prompt = torch.zeros(self.bounds[-1], dtype=torch.bool)
        for begin, count in zip(self.bounds, counts):
            prompt[begin : begin + count] = True
        return prompt

    @property
    def leaves(self):
        named = {"x": self.x, "a": self.a, "b": self.b, "bias": self.bias, "table": self.table}
        found = {name: leaf for name, leaf in named.items() if leaf is not None}
        return found | ({} if self.base is None else {f"base.{n}": p for n, p in self.base.named_parameters()})

    def run(self, **change):
        told = {
            "num_experts": self.experts,
            "rank": self.rank,
            "base": self.base,
            "gate": self.gate,
            "per": self.per,
            "top_k": self.top_k,
            "bias": self.bias,
            "sequences": None if self.per == "token" else self.sequences,
            "task": self.task,
            "table": self.table,
            "scale": self.scale,
        } | change
        x, a, b = (told.pop(name, getattr(self, name)) for name in "xab")
        return ops.gated_adapter(x, a, b, **told)

    def gates(self):
        """Gates of every token [T, E], sequence by sequence."""
        x, router = self.x.flatten(0, -2), self.a[self.width + self.memory :]
        logits = (x @ router.T).to(torch.promote_types(x.dtype, torch.float32))
        if self.per != "token":
            none = logits.new_zeros(0, self.experts)
            logits = torch.cat([none, *(self._logits_of_sequence(logits, d) for d in range(len(self.bounds) - 1))])
        logits = logits if self.bias is None else logits + self.bias
        if self.gate == "one_hot":
            return logits
        if self.gate == "sigmoid":
            return 1 / (1 + torch.exp(-logits))
        if self.gate == "topk":
            least = logits.sort(-1, descending=True).values[:, self.top_k - 1 : self.top_k]
            logits = torch.where(logits < least, -torch.inf, logits)
        powers = torch.exp(logits)
        return powers / powers.sum(-1, keepdim=True)

    def _logits_of_sequence(self, logits, d):
        begin, end = self.bounds[d], self.bounds[d + 1]
        if self.per == "task":
            task = self.task[d if len(self.task) > 1 else 0]
            rows = torch.eye(self.experts, device=logits.device) if self.table is None else self.table
            return rows[task].expand(end - begin, self.experts)
        looked_at = logits[begin:end][self.prompt[begin:end]]
        return (looked_at.sum(0) / max(len(looked_at), 1)).expand(end - begin, self.experts)

    def loop(self):
        """One expert after another, at full width."""
        x, g = self.x, self.gates().view(*self.x.shape[:-1], self.experts)
        y = x.new_zeros(*x.shape[:-1], len(self.b)) if self.base is None else self.base(x)
        for e in range(self.experts):
            own = slice(e * self.rank, (e + 1) * self.rank)
            y = y + self.scale * g[..., e : e + 1].to(y.dtype) * ((x @ self.a[own].T) @ self.b[:, own].T)
        always = slice(self.width, self.width + self.memory)
        return y + self.scale * (x @ self.a[always].T) @ self.b[:, always].T


def slope(y):
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)


def outputs_and_gradients(problem, y):
    """{"y" or a leaf's name: y, or the leaf's gradient of a fixed function of y}; zeros where there is none."""
    leaves = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y, leaves.values(), slope(y), allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_equal_within(actual, expected, tolerance=1e-12):
    """1e-12: float64 sums of some tens of products of a few units each."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_like_the_loop(problem, **change):
    expected = outputs_and_gradients(problem, problem.loop())
    assert_equal_within(outputs_and_gradients(problem, problem.run(**change)), expected)
