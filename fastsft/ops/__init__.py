"""The operators: tensors in, tensors out. Each has a reference in plain torch, and faster implementations.

>>> import torch
>>> from fastsft import ops
>>> x, dy = torch.ones(5, 3), torch.ones(5, 2)            # 5 tokens, 3 inputs, 2 outputs
>>> offsets = torch.tensor([0, 2, 5])                     # two documents, of 2 and 3 tokens
>>> target = torch.ones(1, 2, 3)                          # one ability's gradient of the weight [2, 3]
>>> ops.influence_dot(x, dy, offsets, target).scores
tensor([[12.],
        [18.]])
"""

from fastsft.ops._op import backend, backends
from fastsft.ops._rows import FORMATS, Rows, decode_rows, encode_rows
from fastsft.ops._sjlt import sjlt_table
from fastsft.ops.gated_adapter import Sequences, gated_adapter
from fastsft.ops.influence_dot import InfluenceDot, document_grads, influence_dot
from fastsft.ops.sample_grad_project import sample_grad_project
from fastsft.ops.sketch_matrix import sketch_matrix
from fastsft.ops.store_topk import TopK, merge_topk, store_topk

__all__ = [
    "FORMATS",
    "InfluenceDot",
    "Rows",
    "Sequences",
    "TopK",
    "backend",
    "backends",
    "decode_rows",
    "document_grads",
    "encode_rows",
    "gated_adapter",
    "influence_dot",
    "merge_topk",
    "sample_grad_project",
    "sjlt_table",
    "sketch_matrix",
    "store_topk",
]
