"""One thread and CPU time for `pytest benchmarks --benchmark-only`, as everywhere in benchmarks/."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
