"""What every test shares: seeds, a bounded number of threads, the test device, and memory that is never zero by luck.

FASTSFT_TEST_DEVICE=cuda   run the same suite on another device
FASTSFT_REQUIRE_NATIVE=1   fail at the start where the compiled kernels or the Triton package are absent
"""

import importlib
import os
import sys

import numpy
import pytest
import torch

from fastsft import _native


def pytest_configure(config):
    # the models are too small to share, and sums keep their order
    torch.set_num_threads(1)
    if os.environ.get("FASTSFT_REQUIRE_NATIVE") == "1":
        if _native.why_absent():
            raise pytest.UsageError(f"FASTSFT_REQUIRE_NATIVE=1, but {_native.why_absent()}")
        importlib.import_module("fastsft.triton_kernels")


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the suite."""
    return torch.device(os.environ.get("FASTSFT_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _unwritten_is_nan(monkeypatch):
    """Fill with NaN what fastsft allocates without writing, so that no output can pass that was never computed."""

    def filled(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "fastsft" and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
