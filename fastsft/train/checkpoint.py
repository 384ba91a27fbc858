"""The books' part of a checkpoint: one safetensors file beside the trainer's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastsft.record import RecordError

NAME = "fastsft_books.safetensors"


def save_books(checkpoint: Path, state: dict[str, Any]) -> Path:
    """Write `Books.state_dict()` into the checkpoint's folder, whole or not at all."""
    from safetensors.torch import save_file

    checkpoint.mkdir(parents=True, exist_ok=True)
    path = checkpoint / NAME
    temporary = path.with_name(f"{NAME}.{os.getpid()}.tmp")
    rest = {key: value for key, value in state.items() if key != "moment"}
    save_file({"moment": state["moment"]}, str(temporary), metadata={"books": json.dumps(rest)})
    os.replace(temporary, path)
    return path


def load_books(checkpoint: Path) -> dict[str, Any] | None:
    """Read the books of a checkpoint; None where it was written without them."""
    from safetensors import SafetensorError, safe_open

    path = checkpoint / NAME
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return {"moment": file.get_tensor("moment"), **json.loads(file.metadata()["books"])}
    except SafetensorError as error:
        raise RecordError(
            f"{path} can't be read ({error}): delete {checkpoint.name} and resume from an earlier one."
        ) from None


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that holds everything a resume needs, the books written last."""
    steps = sorted(
        (int(path.name.split("-")[1]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.split("-")[1].isdigit() and (path / NAME).exists() and (path / "trainer_state.json").exists()
    )
    return steps[-1][1] if steps else None
