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

from fastsft.attribution.methods._base import Method, Moments, Queries, Targets
from fastsft.attribution.methods._checkpoints import Checkpoint
from fastsft.attribution.methods._moments import moments_of, read_moments
from fastsft.attribution.methods._replay import Schedule
from fastsft.attribution.methods._scores import Block, Scores, Summary, Top
from fastsft.attribution.methods.adam_dot import AdamDot
from fastsft.attribution.methods.bm25 import Bm25
from fastsft.attribution.methods.datainf import DataInf
from fastsft.attribution.methods.ekfac import EkFac
from fastsft.attribution.methods.ekfac_cg import EkFacCg
from fastsft.attribution.methods.embedding import Embedding
from fastsft.attribution.methods.grad_cos import GradCos
from fastsft.attribution.methods.grad_dot import GradDot
from fastsft.attribution.methods.in_run import InRun
from fastsft.attribution.methods.length import Length
from fastsft.attribution.methods.less import Less
from fastsft.attribution.methods.logra import LoGra
from fastsft.attribution.methods.loss import Loss
from fastsft.attribution.methods.random import Random
from fastsft.attribution.methods.registry import METHODS, make
from fastsft.attribution.methods.tracin import TracIn
from fastsft.attribution.methods.trak import Trak
from fastsft.attribution.methods.unrolled import Unrolled

__all__ = [
    "METHODS",
    "AdamDot",
    "Block",
    "Bm25",
    "Checkpoint",
    "DataInf",
    "EkFac",
    "EkFacCg",
    "Embedding",
    "GradCos",
    "GradDot",
    "InRun",
    "Length",
    "Less",
    "LoGra",
    "Loss",
    "Method",
    "Moments",
    "Queries",
    "Random",
    "Schedule",
    "Scores",
    "Summary",
    "Targets",
    "Top",
    "TracIn",
    "Trak",
    "Unrolled",
    "make",
    "moments_of",
    "read_moments",
]
