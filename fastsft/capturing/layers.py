"""Which layers can be followed, and how: one rule per layer type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

# what `find_layers` follows beside linear layers where it is asked to
EXTRAS = ("embedding", "norm")


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight gradient is a sum over tokens of an outer product.

    name of the weight parameter; weight [O, I] (or [I, O] where `swapped`: x and dy change places). A norm's weight [H]
    counts as [1, H]. part: the part of the model that books may be split by (an expert's name), None for all others.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    swapped: bool = False
    kind: Literal["linear", "embedding", "norm"] = "linear"
    part: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        if self.kind == "norm":
            return 1, len(self.weight)
        rows, columns = self.weight.shape
        return rows, columns

    def factors(self, x: Tensor, dy: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the two sides [T, columns], [T, rows] whose outer product has the shape of the weight.

        Of an embedding the second side is one-hot: the ids [T], int64, stand for it.
        """
        if self.kind == "norm":
            return self._norm_factors(x, dy, num_tokens)
        if self.kind == "embedding":
            return self._embedding_factors(x, dy)
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return (dy, x) if self.swapped else (x, dy)

    def _norm_factors(self, x: Tensor, dy: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        # y = w * xhat + (what does not depend on w), also for norms that multiply by 1 + w
        product = _wide(dy) * _wide(self._slope(x, torch.ones_like(self.weight)))
        heads = product.numel() // max(1, num_tokens * product.shape[-1])
        if x.dim() == 4 and heads in x.shape[1:3]:  # a norm of each head: [B, heads, T, H] or [B, T, heads, H]
            # where T is the number of heads: heads of a token lie beside each other in memory
            product = product.sum(min((1, 2), key=lambda dim: (x.shape[dim] != heads, x.stride(dim))))
        x2 = product.reshape(-1, product.shape[-1])
        return x2, x2.new_ones(len(x2), 1)

    def _embedding_factors(self, ids: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        # some embeddings multiply by a constant: its slope at any one id
        ones = self.weight.new_ones(1, 1).expand_as(self.weight)
        x2 = _wide(dy) * _wide(self._slope(ids.new_zeros(1), ones))
        padding = getattr(self.module, "padding_idx", None)
        if padding is not None:  # autograd gives this row no gradient
            x2 = x2.masked_fill((ids == padding)[..., None], 0)
        return x2.reshape(-1, x2.shape[-1]), ids.reshape(-1)

    @torch.no_grad()
    def _slope(self, x: Tensor, direction: Tensor) -> Tensor:
        """What the layer, affine in its weight, adds to its output for one unit of `direction`."""
        high = functional_call(self.module, {"weight": direction}, (x,))
        return high - functional_call(self.module, {"weight": torch.zeros_like(direction)}, (x,))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


Rule = Callable[[str, nn.Module], Layer]
_RULES: dict[str, Rule] = {}


def layer_rule(kind: str) -> Callable[[Rule], Rule]:
    """Register how layers whose class, or one of its bases, is called `kind` (module.Class) are followed."""

    def register(rule: Rule) -> Rule:
        _RULES[kind] = rule
        return rule

    return register


@layer_rule("torch.nn.modules.linear.Linear")
def _linear(name: str, module: nn.Module) -> Layer:
    return Layer(f"{name}.weight" if name else "weight", module, module.weight)  # type: ignore[arg-type]


@layer_rule("transformers.pytorch_utils.Conv1D")
def _conv1d(name: str, module: nn.Module) -> Layer:
    # y = x W + b with W [I, O]: GPT-2 and its kin
    return Layer(f"{name}.weight", module, module.weight, swapped=True)  # type: ignore[arg-type]


@layer_rule("fastsft.adapters.factor.Factor")
def _factor(name: str, module: nn.Module) -> Layer:
    # a matrix of a gated adapter: called with what it multiplied and what came of it
    return Layer(f"{name}.weight", module, module.weight, part=str(module.part))  # type: ignore[arg-type]


def _rule_of(module: nn.Module) -> Rule | None:
    for base in type(module).__mro__:
        rule = _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule
    return None


def find_layers(model: nn.Module, extra: Sequence[str] = ()) -> list[Layer]:
    """Find every trainable layer of `model` that can be followed, in the order of its modules.

    Left out: the output embedding (trainers fuse it with the loss and never call it) and weights that another
    kind of layer shares (a tied embedding), as their gradient is not a sum over one layer's tokens.
    extra: "embedding" and "norm" (classes called ...RMSNorm or ...LayerNorm) follow those layers too.
    """
    if unknown := set(extra) - set(EXTRAS):
        raise ValueError(f"`extra` may name {', '.join(EXTRAS)}: got {', '.join(sorted(unknown))}.")
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    candidates = _candidates(model, extra)
    layers = [layer for layer in candidates if layer.module is not head and layer.weight.requires_grad]
    for layer in layers:
        if layer.kind == "embedding":
            _check_embedding(layer, uses[id(layer.weight)])
    return [layer for layer in layers if uses[id(layer.weight)] == 1]


def _candidates(model: nn.Module, extra: Sequence[str]) -> Iterator[Layer]:
    for name, module in model.named_modules():
        rule = _rule_of(module)
        if rule is not None:
            yield rule(name, module)
        elif (kind := _extra_kind(module)) in extra:
            yield Layer(f"{name}.weight" if name else "weight", module, module.weight, kind=kind)  # type: ignore[arg-type]


def _extra_kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return "norm" if named and isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def _check_embedding(layer: Layer, uses: int) -> None:
    if uses > 1:
        raise ValueError(
            f"{layer.name} is shared with another layer (a tied output embedding), so its gradient is not a sum over "
            f"one layer's tokens. Untie the two (`tie_word_embeddings=False`), or leave 'embedding' out of `extra`."
        )
    if getattr(layer.module, "scale_grad_by_freq", False):
        raise ValueError(
            f"{layer.name} scales its gradient by how often a token occurs in the batch, so no document has a gradient "
            f"of its own. Set `scale_grad_by_freq=False`, or leave 'embedding' out of `extra`."
        )
