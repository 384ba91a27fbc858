import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Run on one thread: these models are too small to share, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
