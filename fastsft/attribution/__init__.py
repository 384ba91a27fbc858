"""Who moved what: the ledger of a run, and the influence of every sample and token on every ability."""

from fastsft.attribution.books import Books
from fastsft.attribution.ledger import Entry, Ledger
from fastsft.attribution.settings import Attribution
from fastsft.attribution.targets import Targets, TargetState

__all__ = ["Attribution", "Books", "Entry", "Ledger", "TargetState", "Targets"]
