"""Training under attribution: `attach` to a trainer you have, or `run` a file; then sketch its samples and search."""

from fastsft.record import versions
from fastsft.train.attach import AttachError, Run, attach
from fastsft.train.attribute import attribute, attribute_model
from fastsft.train.config import ConfigError, RunConfig, load_config, parse_config
from fastsft.train.finished import FinishedRun
from fastsft.train.hit_table import answer_lines
from fastsft.train.loop import run
from fastsft.train.query import Answer, search_store

__all__ = [
    "Answer",
    "AttachError",
    "ConfigError",
    "FinishedRun",
    "Run",
    "RunConfig",
    "answer_lines",
    "attach",
    "attribute",
    "attribute_model",
    "load_config",
    "parse_config",
    "run",
    "search_store",
    "versions",
]
