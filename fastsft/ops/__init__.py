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
from fastsft.ops._sjlt import sjlt_table, sketch_matrix
from fastsft.ops.influence_dot import InfluenceDot, document_grads, influence_dot

__all__ = [
    "FORMATS",
    "InfluenceDot",
    "Rows",
    "backend",
    "backends",
    "decode_rows",
    "document_grads",
    "encode_rows",
    "influence_dot",
    "sjlt_table",
    "sketch_matrix",
]
