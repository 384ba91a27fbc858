"""Whitening: P^1/2 applied to every gradient, so that a plain dot product of two sketches is g^T P g'.

Samples and queries get the same map, so a store of whitened sketches is scanned as any other.
"""

# D documents, O outputs, I inputs

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.capturing import Layer, find_layers
from fastsft.sketch.rotate import rotate_grads


@dataclass(frozen=True, eq=False)
class LayerWhitening:
    """P^1/2 G = scale * (left^T G right), elementwise scale [O, I]; left [O, O] and right [I, I] or neither.

    The rotation back, left (...) right^T, is left out: it changes no dot product.
    """

    scale: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def apply(self, grads: Tensor) -> Tensor:
        """Whiten whole gradients [D, O, I] -> [D, O, I]."""
        return rotate_grads(grads, self.left, self.right) * self.scale

    def precondition(self, grads: Tensor) -> Tensor:
        """Apply the whole of P, rotation back included, to gradients [D, O, I] -> [D, O, I] that are not whitened."""
        left, right = (t if t is None else t.T for t in (self.left, self.right))
        return rotate_grads(self.apply(grads).mul_(self.scale), left, right).contiguous()

    def to(self, like: Tensor) -> LayerWhitening:
        """Move to the device and type of `like`."""
        left, right = (t if t is None else t.to(like) for t in (self.left, self.right))
        return LayerWhitening(self.scale.to(like), left, right)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"scale": self.scale, "left": self.left, "right": self.right}
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class Whitening:
    """One map a followed weight, by parameter name. precondition: as in `SketchSpec`; about: how it was fitted."""

    precondition: str
    layers: Mapping[str, LayerWhitening]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Name the contents by 32 hex digits: sketches of two whitenings are not comparable."""
        found = hashlib.blake2b(json.dumps([self.precondition, self.about], sort_keys=True).encode(), digest_size=16)
        for name, tensor in sorted(self._tensors().items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{key}:{name}": tensor for name, layer in self.layers.items() for key, tensor in layer._tensors().items()
        }

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, with the digest in its header."""
        from safetensors.torch import save_file

        header = {"precondition": self.precondition, "about": json.dumps(self.about), "digest": self.digest}
        # layers with one input share eigenvectors, which the format does not
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in self._tensors().items()}
        save_file(tensors, path, {"fastsft": "whitening", **header})

    @staticmethod
    def load(path: Path | str) -> Whitening:
        """Read what `save` wrote; a file whose contents do not match its digest is refused."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}). Fit and save it again.") from error
        if header.get("fastsft") != "whitening":
            raise ValueError(f"{path} is not a whitening saved by fastsft. Give the file that `Whitening.save` wrote.")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            parts.setdefault(name, {})[kind] = tensor
        layers = {name: LayerWhitening(**part) for name, part in parts.items()}
        found = Whitening(header["precondition"], layers, json.loads(header["about"]))
        if found.digest != header["digest"]:
            raise ValueError(f"{path} is damaged: its digest is {found.digest}, its header says {header['digest']}.")
        return found

    def of(self, layers: Sequence[Layer]) -> list[LayerWhitening]:
        """Pick each layer's map, on its device, in float32 at least."""
        found = []
        for layer in layers:
            if layer.name not in self.layers:
                raise ValueError(
                    f"the whitening does not know {layer.name}: it was fitted on {len(self.layers)} other layers "
                    f"({', '.join(list(self.layers)[:2])} ...). Fit it on this model with this SketchSpec."
                )
            known = self.layers[layer.name]
            if tuple(known.scale.shape) != layer.shape:
                raise ValueError(
                    f"the whitening of {layer.name} has shape {list(known.scale.shape)}, the layer "
                    f"{list(layer.shape)}. Fit it on this model."
                )
            like = layer.weight.new_empty(0, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
            found.append(known.to(like))
        return found


class AdamWhitener(Whitening):
    """P = 1 / (sqrt(v_hat) + eps) elementwise: how far Adam's step would follow each coordinate of a gradient."""

    @classmethod
    def from_second_moments(cls, moments: Mapping[str, Tensor], *, eps: float = 1e-8) -> AdamWhitener:
        """Take bias-corrected second moments v_hat [O, I] (a norm's [H]) by parameter name."""
        layers = {
            name: LayerWhitening((v.detach().sqrt() + eps).rsqrt().reshape(1 if v.dim() == 1 else len(v), -1))
            for name, v in moments.items()
        }
        return cls("adam", layers, {"eps": eps})

    @classmethod
    def from_optimizer(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, extra: Sequence[str] = ()
    ) -> AdamWhitener:
        """Read the second moments of torch.optim.Adam or AdamW (or its like) for the layers that are followed."""
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        moments: dict[str, Tensor] = {}
        eps = set()
        for layer in find_layers(model, extra):
            state, group = optimizer.state.get(layer.weight, {}), groups.get(layer.weight, {})
            if "exp_avg_sq" not in state or "betas" not in group or "eps" not in group:
                raise ValueError(
                    f"{type(optimizer).__name__} has no second moment of {layer.name}. Whiten by 'adam' with an Adam "
                    f"or AdamW that has taken a step on it, or by 'ekfac', which needs no optimizer."
                )
            second = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # amsgrad divides by the largest so far
            moments[layer.name] = second / (1 - group["betas"][1] ** float(state["step"]))
            eps.add(float(group["eps"]))
        if len(eps) > 1:
            raise ValueError(f"parameter groups must share one `eps` to be whitened alike: got {sorted(eps)}.")
        return cls.from_second_moments(moments, eps=eps.pop() if eps else 1e-8)
