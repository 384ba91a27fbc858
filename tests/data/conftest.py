import os
from pathlib import Path

import pytest

from fastsft.data import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world(seed=0, quick=True)


@pytest.fixture(scope="session")
def tokenizer(world):
    return world.tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Find the folder of real data, or skip: it does not travel with the package."""
    given = os.environ.get("FASTSFT_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"
    if not (folder / "base-model").is_dir():
        pytest.skip(f"no real data at {folder}; set FASTSFT_DATA to the folder that holds base-model/")
    return folder
