"""This process among its peers under torch.distributed; alone where there is none."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
