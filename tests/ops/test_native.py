"""fastsft/_native.py and fastsft/ops/_cuda.py: loading what was compiled, and saying why not."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastsft import _native
from fastsft.ops import _cuda

ROOT = Path(__file__).parent.parent.parent


def test_unbuilt_checkout_is_a_sentence(monkeypatch):
    def absent(name):
        raise ImportError("No module named 'fastsft._C'")

    monkeypatch.setattr(_native.importlib, "import_module", absent)
    _native.why_absent.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"No module named 'fastsft\._C'.*build_ext --inplace"):
            _native.module()
    finally:
        _native.why_absent.cache_clear()


def test_another_abi_is_a_sentence(monkeypatch):
    if _native.why_absent():
        pytest.skip(_native.why_absent())
    monkeypatch.setattr(_native, "ABI_VERSION", 999)
    _native.why_absent.cache_clear()
    try:
        assert "needs 999: build it again" in _native.why_absent()
    finally:
        _native.why_absent.cache_clear()


def test_unknown_instruction_set_is_a_sentence():
    if _native.why_absent():
        pytest.skip(_native.why_absent())
    with pytest.raises(ValueError, match=r"this machine runs \(base.*got mmx"):
        _native.module().set_isa("mmx")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_sources_compile(arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    assert sources
    for source in sources:
        command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", f"-arch=sm_{arch}", "-cubin"]
        result = subprocess.run(
            [*command, str(source), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


def test_cuda_library_loads_without_a_device():
    if not _cuda.LIBRARY.exists():
        pytest.skip("the CUDA kernels were not built")
    assert _cuda._library().fastsft_cuda_abi_version() == _cuda.ABI_VERSION


def test_cuda_segment_sum_equals_reference(device):
    if _cuda.why_no_library():
        pytest.skip(_cuda.why_no_library())
    values = torch.randn(1000, 3, device="cuda")
    offsets = torch.tensor([5, 5, 300, 301, 990], device="cuda")
    expected = torch.segment_reduce(values.double(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    torch.testing.assert_close(_cuda.segment_sum(values, offsets).double(), expected, rtol=1e-5, atol=1e-4)
