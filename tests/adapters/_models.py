"""A tiny Llama with gated adapters away from zero, and the same thing written as loops."""

import torch

from fastsft.adapters import GatedConfig, attach_gated
from tests.train._support import VOCABULARY, make_model

# every gate with every granularity that it may have
KINDS = [
    (gate, granularity)
    for gate in ("sigmoid", "softmax", "topk", "one_hot")
    for granularity in ("token", "sequence", "task")
    if gate != "one_hot" or granularity == "task"
]
EXPERTS = ["maths", "code", "general"]


def gated_model(gate="sigmoid", granularity="sequence", *, model=None, double=True, seed=5, **settings):
    """(model, gated): experts, memory and gates drawn at random, so that every part matters."""
    model = model or make_model()
    model = model.double() if double else model
    given = {"experts": EXPERTS, "rank": 2, "memory_rank": 3, **settings}
    gated = attach_gated(model.eval(), GatedConfig(gate=gate, granularity=granularity, **given))
    randomise(gated, seed)
    if granularity == "task":
        gated.set_task("code")
    return model, gated


def randomise(gated, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in gated.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def make_batch(rows=2, length=9, prompt=4, seed=0):
    """Token ids [B, L] and labels that begin after `prompt` tokens."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return ids, labels


class Loops:
    """The gated model as a loop over tokens' gates and over experts, on the same parameters, by plain autograd."""

    def __init__(self, gated, prompt):
        self.gated, self.config, self.prompt = gated, gated.config, prompt
        self.found = {}

    def gates(self, block, x):
        if self.config.granularity == "task":
            task = torch.tensor([self.gated.tasks.index("code")])
            gating = block.gating
            if gating.table is None:
                return torch.nn.functional.one_hot(task, len(EXPERTS)).to(x)[:, None]
            return self.values(gating.table[task])[:, None]
        logits = torch.stack([x @ row.weight.weight[0] for row in block.gating.experts.values()], -1)  # [B, L, E]
        if self.config.granularity == "sequence":
            logits = logits[:, : self.prompt].mean(1, keepdim=True)
        return self.values(logits + torch.cat([row.bias for row in block.gating.experts.values()]))

    def values(self, logits):
        if self.config.gate == "sigmoid":
            return torch.sigmoid(logits)
        if self.config.gate == "topk":
            kept = logits >= logits.topk(self.config.top_k, -1).values[..., -1:]
            logits = torch.where(kept, logits, -torch.inf)
        return torch.softmax(logits, -1)

    def layer(self, adapter, base, x):
        block = adapter.block
        if block.number not in self.found:  # the layer that the block calls first
            self.found[block.number] = self.gates(block, x)
        y, g = base(x), self.found[block.number]
        for number, pair in enumerate(adapter.experts.values()):
            y = y + self.config.scale * g[..., number : number + 1] * ((x @ pair.A.weight.T) @ pair.B.weight.T)
        return y + self.config.scale * ((x @ adapter.memory.A.weight.T) @ adapter.memory.B.weight.T)

    def __call__(self, ids, labels):
        """The model's logits and loss by the loops: its adapters' hooks are set aside meanwhile."""
        model, kept = self.gated.model, {}
        for name, adapter in self.gated.adapters.items():
            base = model.get_submodule(name)
            kept[name] = base._forward_pre_hooks.copy(), base._forward_hooks.copy()
            base._forward_pre_hooks.clear()
            base._forward_hooks.clear()
            own = base.forward
            base.forward = lambda x, adapter=adapter, own=own: self.layer(adapter, own, x)
        try:
            return model(ids, labels=labels)
        finally:
            for name, (before, after) in kept.items():
                base = model.get_submodule(name)
                del base.forward
                base._forward_pre_hooks.update(before)
                base._forward_hooks.update(after)
