"""Build fastsft._C (C++, always) and fastsft/_cuda.so (where nvcc is found) with ninja.

FASTSFT_CUDA=auto|0|1     build the CUDA kernels where nvcc is found (default) | never | or fail
FASTSFT_CUDA_ARCHS        compute capabilities, default those of "80;90;100" that nvcc knows; the last as PTX too
MAX_JOBS                  compile jobs at a time, default: the number of CPUs
CXX, NVCC                 other compilers

Everything else is in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread -Wall -Wextra -Wno-psabi"
# One translation unit per instruction set, named <op>_<set>.cpp; files without a set are built for any machine.
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "avx512vnni": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mavx512vpopcntdq -mfma "
    "-mprefer-vector-width=512",
}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def isa_of(source: Path) -> str | None:
    return next((isa for isa in ISA_FLAGS if source.stem.endswith(f"_{isa}")), None)


def find_nvcc() -> str | None:
    if "NVCC" in os.environ:
        return shutil.which(os.environ["NVCC"])
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_archs(nvcc: str) -> list[str]:
    """The compute capabilities to build for: those asked for, or those of the default that this nvcc knows."""
    if "FASTSFT_CUDA_ARCHS" in os.environ:
        return [arch for arch in os.environ["FASTSFT_CUDA_ARCHS"].replace(",", ";").split(";") if arch]
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]


def cuda_wanted() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why."""
    choice = os.environ.get("FASTSFT_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTSFT_CUDA must be auto, 0 or 1: got {choice!r}.")
    if choice == "0":
        return False, "FASTSFT_CUDA=0"
    if find_nvcc() is None:
        if choice == "1":
            raise SystemExit(
                "FASTSFT_CUDA=1 asks for the CUDA kernels, but nvcc was not found. Put it on PATH or set NVCC."
            )
        return False, "nvcc was not found"
    return True, f"nvcc is {find_nvcc()}"


def ninja_command() -> list[str]:
    """The ninja of the build requirement: in an isolated build it is a module, not a program on PATH."""
    return [sys.executable, "-m", "ninja"]


def escape(path) -> str:
    """A path as ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def native_rules(build: Path, target: Path) -> str:
    includes = (
        f"-I{escape(pybind11.get_include())} -I{escape(sysconfig.get_paths()['include'])} -I{escape(ROOT / 'csrc')}"
    )
    flags = f"{CXX_FLAGS} {'-DFASTSFT_X86 ' if is_x86() else ''}{includes}"
    lines = [f"cxx = {os.environ.get('CXX', 'c++')}", "rule compile"]
    lines += [f"  command = $cxx {flags} $isa -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $cxx -shared -pthread -Wl,-s $in -o $out"]
    objects = []
    for source in [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
        isa = isa_of(source)
        if isa and not is_x86():
            continue
        objects.append(escape(build / f"{source.stem}.o"))
        lines += [f"build {objects[-1]}: compile {escape(source)}", f"  isa = {ISA_FLAGS[isa] if isa else ''}"]
    return "\n".join([*lines, f"build {escape(target)}: link {' '.join(objects)}", ""])


def cuda_rules(build: Path, target: Path) -> str:
    nvcc = find_nvcc()
    archs = cuda_archs(nvcc)
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    sources = " ".join(escape(source) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")))
    headers = " ".join(escape(header) for header in sorted((ROOT / "csrc/cuda").glob("*.cuh")))
    return "\n".join(
        [
            "rule cuda",
            f"  command = {escape(nvcc)} -std=c++17 -O3 {' '.join(codes)} -cudart static -shared "
            "-Xcompiler -fPIC,-fvisibility=hidden $in -o $out",
            f"build {escape(target)}: cuda {sources} | {headers}",
            "",
        ]
    )


class NinjaBuild(build_ext):
    """Build each extension from a build.ninja of its own."""

    def get_ext_filename(self, fullname: str) -> str:
        # _cuda.so is loaded by ctypes, not imported: it bears no Python version in its name.
        if fullname.split(".")[-1] == "_cuda":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        wanted, reason = cuda_wanted()
        if not wanted:
            print(f"fastsft: the CUDA kernels are not built: {reason}.", file=sys.stderr)
            self.extensions = [ext for ext in self.extensions if ext.name != "fastsft._cuda"]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        rules = cuda_rules if ext.name == "fastsft._cuda" else native_rules
        (build / "build.ninja").write_text(rules(build, target))
        jobs = os.environ.get("MAX_JOBS")
        if jobs is not None and not (jobs.isdigit() and int(jobs) > 0):
            raise SystemExit(f"MAX_JOBS must be a whole number above 0: got {jobs!r}.")
        subprocess.run([*ninja_command(), "-C", str(build), *(["-j", jobs] if jobs else [])], check=True)


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


setup(
    packages=[*find_packages(include=["fastsft", "fastsft.*"]), "fastsft.triton_kernels"],
    package_dir={"fastsft.triton_kernels": "triton_kernels"},
    ext_modules=[
        # `depends` also puts the headers into the sdist.
        Extension("fastsft._C", sources=files("*.cpp", "cpu/*.cpp"), depends=files("*.h", "cpu/*.h")),
        Extension("fastsft._cuda", sources=files("cuda/*.cu"), depends=files("cuda/*.cuh")),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
