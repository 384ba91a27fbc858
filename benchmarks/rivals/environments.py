"""A virtual environment a rival: torch pinned first, then the rival without its own pins, then what it imports.

Rivals are installed with --no-deps: bergson and kronfluence require torchvision (bergson torchaudio and bitsandbytes
too), which no code raced here imports; a torchvision that does not fit torch breaks `import transformers`, and an
unpinned one replaces torch.
"""

import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT

DEFAULT_CACHE = Path.home() / ".cache" / "fastsft-rivals"
TORCH = "torch==2.13.0"
MODELS = ("numpy", "transformers", "peft", "accelerate", "safetensors", "tqdm")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What one rival needs: the rival itself, pinned, and the packages that the raced code imports."""

    rival: str
    needs: tuple[str, ...]


ENVIRONMENTS = {
    "bergson": Environment(
        rival="bergson==2.5.1",
        needs=(
            *MODELS,
            "datasets",
            "jinja2",
            "jaxtyping",
            "ml_dtypes",
            "natsort",
            "petname",
            "pyarrow",
            "pyyaml",
            "scipy",
            "simple-parsing",
            "torchopt",
        ),
    ),
    "faiss": Environment(rival="faiss-cpu==1.15.1", needs=("numpy", "packaging")),
    "dattri": Environment(rival="dattri==0.3.0", needs=(*MODELS, "scipy", "pyyaml")),
    "kronfluence": Environment(rival="kronfluence==1.0.1", needs=(*MODELS, "einops", "einconv", "opt-einsum")),
    "traker": Environment(rival="traker==0.3.2", needs=MODELS),
}


def python_of(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Make the rival's environment, or find it made from the same list -> its python."""
    environment = ENVIRONMENTS[name]
    place = cache / name
    stamp = place / "fastsft-rival.json"
    recipe = {"torch": TORCH, "rival": environment.rival, "needs": list(environment.needs)}
    python = place / "bin" / "python"
    if stamp.exists() and json.loads(stamp.read_text()) == recipe:
        return python
    print(f"{name}: making an environment in {place}", file=sys.stderr)
    venv.create(place, with_pip=True, clear=True)
    constraints = str(ROOT / "constraints.txt")
    for wanted in (
        ["-c", constraints, TORCH],
        ["-c", constraints, *environment.needs],
        ["--no-deps", environment.rival],
    ):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    stamp.write_text(json.dumps(recipe))  # last: a half-made environment is made again
    return python
