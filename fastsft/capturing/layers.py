"""Which layers can be followed, and how: one rule per layer type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight gradient is a sum over tokens of an outer product.

    name of the weight parameter; weight [O, I] (or [I, O] where `swapped`: x and dy change places).
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    def factors(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sides [T, columns], [T, rows] whose outer product has the shape of the weight."""
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return (dy, x) if self.swapped else (x, dy)


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


def _rule_of(module: nn.Module) -> Rule | None:
    for base in type(module).__mro__:
        rule = _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule
    return None


def find_layers(model: nn.Module) -> list[Layer]:
    """Find every trainable layer of `model` that can be followed, in the order of its modules.

    Left out: the output embedding (trainers fuse it with the loss and never call it) and weights that another
    kind of layer shares (a tied embedding), as their gradient is not a sum over one layer's tokens.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        layer
        for layer in _candidates(model)
        if layer.module is not head and layer.weight.requires_grad and uses[id(layer.weight)] == 1
    ]


def _candidates(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        rule = _rule_of(module)
        if rule is not None:
            yield rule(name, module)
