"""Training under attribution: `attach` to a trainer you have, or `run` a file; then sketch its samples and search."""

from fastsft.record import versions
from fastsft.train.attach import AttachError, Run, attach
from fastsft.train.attribute import attribute, attribute_model
from fastsft.train.config import ConfigError, RunConfig, load_config, parse_config
from fastsft.train.estimate import Estimate, attribute_queries
from fastsft.train.finished import FinishedRun
from fastsft.train.hit_table import answer_lines
from fastsft.train.loop import run
from fastsft.train.query import Answer, search_store
from fastsft.train.sampler import Draws
from fastsft.train.steering import Steering, steer_static

__all__ = [
    "Answer",
    "AttachError",
    "ConfigError",
    "Draws",
    "Estimate",
    "FinishedRun",
    "Run",
    "RunConfig",
    "Steering",
    "answer_lines",
    "attach",
    "attribute",
    "attribute_model",
    "attribute_queries",
    "load_config",
    "parse_config",
    "run",
    "search_store",
    "steer_static",
    "versions",
]
