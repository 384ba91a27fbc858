"""Training under attribution: `attach` to a trainer you have, or `run` a file."""

from fastsft.record import versions
from fastsft.train.attach import AttachError, Run, attach
from fastsft.train.config import ConfigError, RunConfig, load_config, parse_config
from fastsft.train.loop import run

__all__ = ["AttachError", "ConfigError", "Run", "RunConfig", "attach", "load_config", "parse_config", "run", "versions"]
