"""TracIn with Adam's step lengths: each coordinate weighs as much as Adam would follow it."""

# Q queries, O outputs, I inputs

from __future__ import annotations

from torch import Tensor

from fastsft.attribution.methods._base import Moments
from fastsft.attribution.methods._gradients import Directions, GradientMethod, Turn, followed
from fastsft.sketch.passes import Batching


class AdamDot(GradientMethod):
    """score(i, q) = sum over checkpoints of share * <P g_q, g_i>, P = 1 / (sqrt(v_hat) + eps) elementwise,
    v_hat = exp_avg_sq / (1 - beta2^step).

    The linear term of Adam's step with its denominator held. `optimizer_state` is needed: moments of after the
    checkpoint's step are better than of before it, when early in a LoRA run v of A is next to nothing.
    """

    name = "adam_dot"
    unit = "nats per response token by Adam's steps on the sample, per unit of the run's summed learning rate"

    def __init__(
        self,
        *,
        beta2: float = 0.999,
        eps: float = 1e-8,
        batching: Batching | None = None,
        direction_bytes: int = 2**31,
    ) -> None:
        super().__init__(batching=batching, direction_bytes=direction_bytes)
        if not 0 <= beta2 < 1 or eps <= 0:
            raise ValueError(f"`beta2` must be in [0, 1) and `eps` above 0: got beta2={beta2}, eps={eps}.")
        self.beta2, self.eps = beta2, eps

    def turn(self, moments: Moments | None) -> Turn:
        if moments is None:
            raise ValueError(
                "adam_dot divides by the optimizer's second moments, and none were given: pass `optimizer_state`, one "
                "for each checkpoint, or use tracin, which needs none."
            )
        factors = {layer.name: self._factor(moments, layer.name, layer.weight) for layer in followed(self.model)}

        def turned(directions: Directions) -> Directions:
            return {name: direction * factors[name].to(direction) for name, direction in directions.items()}

        return turned

    def _factor(self, moments: Moments, name: str, weight: Tensor) -> Tensor:
        """1 / (sqrt(v_hat) + eps) [O, I], float32 at least."""
        state = moments.get(name, {})
        second, step = state.get("exp_avg_sq"), float(state.get("step", 0))
        if not isinstance(second, Tensor) or second.shape != weight.shape or step < 1:
            came = list(second.shape) if isinstance(second, Tensor) else "nothing"
            raise ValueError(
                f"`optimizer_state` must hold exp_avg_sq {list(weight.shape)} of {name} after 1 or more steps: got "
                f"{came} at step {step:g}. Read it from the checkpoint of this model's Adam or AdamW."
            )
        wide = second if second.element_size() > 4 else second.float()
        return 1 / ((wide / (1 - self.beta2**step)).sqrt() + self.eps)
