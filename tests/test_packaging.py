"""What a wheel of fastsft holds, what building it needs, and what `import fastsft` does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, where importing torch fails."""
    place = tmp_path_factory.mktemp("wheel")
    source, poison = place / "source", place / "poison"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".*", "build", "*.so", "*.egg-info", "tests", "benchmarks", "docs", "__pycache__"
        ),
    )
    (poison / "torch").mkdir(parents=True)
    (poison / "torch/__init__.py").write_text("raise ImportError('the build imported torch')\n")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(place), str(source)],
        env=os.environ | {"FASTSFT_CUDA": "0", "MAX_JOBS": "2", "PYTHONPATH": str(poison)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = place.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_only_top_level_name_is_fastsft(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastsft"}


def test_every_module_and_data_file_is_inside(wheel):
    names = set(wheel.namelist())
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "fastsft").rglob("*.py")}
    expected |= {f"fastsft/triton_kernels/{file.name}" for file in (ROOT / "triton_kernels").glob("*.py")}
    report = ROOT / "fastsft/report"
    for pattern in ("*.jinja", "*.html", "*.js", "*.css"):
        expected |= {str(file.relative_to(ROOT)) for file in report.glob(pattern)}
    assert "fastsft/py.typed" in names
    assert expected <= names
    assert any(name.startswith("fastsft/_C.") for name in names)
    assert not any(name.endswith(("_cuda.so", ".cpp", ".h")) for name in names)


def test_the_command_is_declared(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "fastsft = fastsft.cli:app" in wheel.read(entry_points).decode()


def test_dependencies_have_no_caps(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")]
    assert any("torch>=2.11" in line for line in required)
    assert not [line for line in required if "<" in line or "==" in line.split(";")[0]]


def build(*, env):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", env["OUT"], "--build-lib", env["OUT"]]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_insisting_on_cuda_without_nvcc_is_a_sentence(tmp_path):
    result = build(env={"FASTSFT_CUDA": "1", "NVCC": "/nowhere/nvcc", "OUT": str(tmp_path)})
    assert result.returncode != 0
    assert "nvcc was not found. Put it on PATH or set NVCC." in result.stderr


def test_an_unknown_choice_of_cuda_is_a_sentence(tmp_path):
    result = build(env={"FASTSFT_CUDA": "maybe", "OUT": str(tmp_path)})
    assert result.returncode != 0
    assert "FASTSFT_CUDA must be auto, 0 or 1: got 'maybe'." in result.stderr


def test_kernels_refuse_the_top_level_name():
    result = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "installed as fastsft.triton_kernels" in result.stderr


def test_import_is_light():
    heavy = ["datasets", "trl", "triton", "peft", "transformers.modeling_utils", "transformers.trainer", "sklearn"]
    heavy += ["altair", "pyarrow", "fastsft._C", "fastsft.triton_kernels"]
    code = f"import sys, fastsft; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
