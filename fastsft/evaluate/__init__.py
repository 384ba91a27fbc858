"""Whether attribution is any good, beside BM25 and chance: retraining, LDS, removal, tail-patch, planted truths, checks
that need no truth; and what a model can do, by its answers.

from fastsft.evaluate import evaluate

print(evaluate("runs/a", methods=["ekfac"], budget="30m"))
"""

from fastsft.evaluate.abilities import AbilityResult, evaluate_abilities, of_run, wilson
from fastsft.evaluate.budget import seconds_of
from fastsft.evaluate.finding import auc, duplicate_agreement, mrr, recall_at, wrong_label_auc
from fastsft.evaluate.intervals import Value
from fastsft.evaluate.lds import LdsRow, lds, lds_table
from fastsft.evaluate.measure import leave_source_out, measure_truth
from fastsft.evaluate.planted import Facts, Poisoned, duplicates, facts, poisons, wrong_labels
from fastsft.evaluate.removal import RemovalRow, removal
from fastsft.evaluate.retrain import query_losses, retrain
from fastsft.evaluate.run import Evaluation, evaluate
from fastsft.evaluate.sanity import Randomisation, distinct_top, length_correlation, randomisation, randomised
from fastsft.evaluate.tail_patch import TailRow, tail_patch
from fastsft.evaluate.truth import EvaluationError, Truth

__all__ = [
    "AbilityResult",
    "Evaluation",
    "EvaluationError",
    "Facts",
    "LdsRow",
    "Poisoned",
    "Randomisation",
    "RemovalRow",
    "TailRow",
    "Truth",
    "Value",
    "auc",
    "distinct_top",
    "duplicate_agreement",
    "duplicates",
    "evaluate",
    "evaluate_abilities",
    "facts",
    "lds",
    "lds_table",
    "leave_source_out",
    "length_correlation",
    "measure_truth",
    "mrr",
    "of_run",
    "poisons",
    "query_losses",
    "randomisation",
    "randomised",
    "recall_at",
    "removal",
    "retrain",
    "seconds_of",
    "tail_patch",
    "wilson",
    "wrong_label_auc",
    "wrong_labels",
]
