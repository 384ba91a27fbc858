"""Per-document gradients of any model's linear layers, seen by hooks that change nothing.

>>> import torch
>>> from fastsft.capturing import capture
>>> model = torch.nn.Linear(3, 2, bias=False)
>>> x = torch.randn(4, 5, 3)  # 4 rows of 5 tokens
>>> with capture(model) as captured, captured.batch(rows=(4, 5)):
...     model(x).pow(2).sum().backward()
>>> grads = captured.document_grads()["weight"]
>>> bool(torch.allclose(grads.sum(0), model.weight.grad))
True
"""

from fastsft.capturing.documents import Documents
from fastsft.capturing.hooks import Capture, Captured, capture
from fastsft.capturing.layers import EXTRAS, Layer, find_layers, layer_rule

__all__ = ["EXTRAS", "Capture", "Captured", "Documents", "Layer", "capture", "find_layers", "layer_rule"]
