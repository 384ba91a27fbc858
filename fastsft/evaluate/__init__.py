"""Whether attribution is any good: retraining, LDS, removal, tail-patch, always beside BM25 and chance.

from fastsft.evaluate import evaluate

print(evaluate("runs/a", methods=["ekfac"], budget="30m"))
"""

from fastsft.evaluate.budget import seconds_of
from fastsft.evaluate.intervals import Value
from fastsft.evaluate.lds import LdsRow, lds, lds_table
from fastsft.evaluate.measure import leave_source_out, measure_truth
from fastsft.evaluate.removal import RemovalRow, removal
from fastsft.evaluate.retrain import query_losses, retrain
from fastsft.evaluate.run import Evaluation, evaluate
from fastsft.evaluate.tail_patch import TailRow, tail_patch
from fastsft.evaluate.truth import EvaluationError, Truth

__all__ = [
    "Evaluation",
    "EvaluationError",
    "LdsRow",
    "RemovalRow",
    "TailRow",
    "Truth",
    "Value",
    "evaluate",
    "lds",
    "lds_table",
    "leave_source_out",
    "measure_truth",
    "query_losses",
    "removal",
    "retrain",
    "seconds_of",
    "tail_patch",
]
