"""What a sketch is: kind, size and seed. Equal specs give comparable sketches on any device.

>>> from fastsft.sketch import SketchSpec
>>> SketchSpec(size=1024).layer_seed("model.layers.0.q_proj.weight") == SketchSpec(size=1024).layer_seed("other")
False
"""

from fastsft.sketch.spec import SketchSpec

__all__ = ["SketchSpec"]
