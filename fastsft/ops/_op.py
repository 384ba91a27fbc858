"""One operator, several implementations: which one runs here, and why others don't."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsft import _native

BACKENDS = ("reference", "cpp", "triton", "cuda")
_OPS: dict[str, "Op"] = {}
# Of the whole process, not of a thread or context: autograd runs hooks in threads of its own.
_asked: str | None = None


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A faster way to run an operator on one kind of device."""

    backend: str
    device: str
    run: Callable[..., Any]
    # None, or a sentence saying why it cannot run on this machine.
    why_absent: Callable[[], str | None]
    # What a user who reads `backends()` should know although it runs.
    note: str = ""
    # Taken only where it is asked for by name: right, but not known to be faster.
    by_name: bool = False


class Op:
    """An operator: its reference in plain torch, which runs anywhere, and what is faster in order of preference.

    float64 always takes the reference: it is the precision in which the reference defines the answer.
    """

    def __init__(self, name: str, reference: Callable[..., Any], implementations: list[Implementation]) -> None:
        self.name = name
        self.reference = reference
        self.implementations = implementations
        _OPS[name] = self

    def __call__(self, *args: Any, like: Tensor) -> Any:
        """Run on `args` with the best implementation for the device and type of `like`."""
        run = self._choose(like.device.type, like.dtype)
        if not torch.is_autocast_enabled(like.device.type):
            return run(*args)
        # It would turn our float32 products into bfloat16.
        with torch.autocast(like.device.type, enabled=False):
            return run(*args)

    def _choose(self, device: str, dtype: torch.dtype) -> Callable[..., Any]:
        if _asked == "reference" or (_asked is None and dtype == torch.float64):
            return self.reference
        here = [
            imp
            for imp in self.implementations
            if imp.device == device and (_asked == imp.backend or (_asked is None and not imp.by_name))
        ]
        reasons = []
        for implementation in here:
            reason = implementation.why_absent()
            if reason is None and dtype == torch.float64:
                reason = "it computes in float32, and the inputs are float64"
            if reason is None:
                return implementation.run
            reasons.append(f"{implementation.backend}: {reason}")
        if _asked is not None:
            reason = " ".join(reasons) or f"there is none for device {device!r}."
            raise RuntimeError(f"{self.name} was asked to run with backend {_asked!r}, but {reason}")
        if reasons:
            _warn_once(f"{self.name} on {device} takes its plain torch reference. {' '.join(reasons)}")
        return self.reference

    def report(self) -> dict[str, str]:
        """Say for every implementation "ok", or why it does not run here."""
        rows = {"cpu/reference": "ok", "cuda/reference": why_no_cuda() or "ok"}
        for implementation in self.implementations:
            reason = implementation.why_absent()
            good = f"ok ({implementation.note})" if implementation.note else "ok"
            rows[f"{implementation.device}/{implementation.backend}"] = reason or good
        return rows


def backends() -> dict[str, dict[str, str]]:
    """Report {op: {"device/backend": "ok" or a sentence saying why it does not run here}}."""
    return {name: op.report() for name, op in sorted(_OPS.items())}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Make every operator run with the backend `name`, or fail with the reason; for tests and benchmarks."""
    global _asked
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {', '.join(BACKENDS)}: got {name!r}.")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def is_asked_for(name: str) -> bool:
    """Say whether `backend(name)` is in force: whoever shapes a computation for a kernel by name must know."""
    return _asked == name


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=2)


def why_no_cuda() -> str | None:
    """Say why torch has no CUDA device here, or None where it has one."""
    return None if torch.cuda.is_available() else "torch finds no CUDA device."


@cache
def why_no_triton() -> str | None:
    """Say why the Triton kernels cannot run here, or None where they can."""
    for name in ("triton", "fastsft.triton_kernels"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} could not be imported ({error}). The kernels need triton and an installed fastsft."
    return why_no_cuda()


why_no_cpp = _native.why_absent
