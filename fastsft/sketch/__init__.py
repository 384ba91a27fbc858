"""What a sketch is, and the sketches of a model's samples. Equal specs give comparable sketches on any device.

>>> import torch
>>> from fastsft.data import Row
>>> from fastsft.sketch import SketchSpec, sketch_samples
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
...                                      num_attention_heads=1))
>>> rows = [Row("one", "maths", [1, 2, 3], [-100, 2, 3]), Row("two", "code", [4, 5], [-100, 5])]
>>> for batch in sketch_samples(model, rows, SketchSpec(size=64)):
...     print(batch.ids, batch.sketches.shape, batch.tokens)
['one', 'two'] torch.Size([2, 64]) [2, 1]
"""

from fastsft.sketch.collect import SketchBatch, sketch_samples
from fastsft.sketch.curvature import Curvature, fit_whitening
from fastsft.sketch.spec import SketchSpec
from fastsft.sketch.whiten import AdamWhitener, LayerWhitening, Whitening

__all__ = [
    "AdamWhitener",
    "Curvature",
    "LayerWhitening",
    "SketchBatch",
    "SketchSpec",
    "Whitening",
    "fit_whitening",
    "sketch_samples",
]
