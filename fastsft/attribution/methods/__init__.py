"""Methods that score training samples for queries after the run, behind one interface: `fit`, then `score`.

>>> from fastsft.attribution.methods import GradDot
>>> from fastsft.data import Row
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
...                                      num_attention_heads=1))
>>> rows = [Row("one", "maths", [1, 2, 3], [-100, 2, 3]), Row("two", "code", [4, 5], [-100, 5])]
>>> GradDot().fit(model, [], rows).score([Row("query", "", [1, 2], [-100, 2])]).matrix().shape
torch.Size([2, 1])
"""

from fastsft.attribution.methods._base import Method, Moments, Queries
from fastsft.attribution.methods._checkpoints import Checkpoint
from fastsft.attribution.methods._scores import Block, Scores, Summary, Top
from fastsft.attribution.methods.grad_dot import GradDot

__all__ = ["Block", "Checkpoint", "GradDot", "Method", "Moments", "Queries", "Scores", "Summary", "Top"]
