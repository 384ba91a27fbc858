"""`fastsft run`: make the policy and the resolver that a run file names, and train under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsft.mixing.build import POLICIES, make_policy, read_start, settings_of
from fastsft.mixing.conflict import make_resolver
from fastsft.tasks import MixError
from fastsft.train import ConfigError, Run, RunConfig, Steering
from fastsft.train.loop import run as train_run


def run(config: RunConfig, *, root: Path | None = None, resume: bool = False) -> Run:
    """Run what a run file says; `root` is where its relative paths start. Returns the finished run, report written."""
    return train_run(config, root=root, resume=resume, steering=steering_of(config, root))


def steering_of(config: RunConfig, root: Path | None = None) -> Steering | None:
    """Make what the sections `mix` and `conflict` of a run file ask for; None where the run is not steered."""
    if not config.steered:
        return None
    mix, conflict = config.mix, config.conflict
    try:
        policy = None
        if mix.steered:
            start = read_start(mix.start, root)
            policy = make_policy(mix.policy, start=start, settings=_settings(config), guard=mix.guard)
        return Steering(
            policy=policy,
            draws=mix.draws(config.train.seed),
            resolver=make_resolver(
                conflict.resolver, abilities=list(config.targets), protected=conflict.protected, seed=config.train.seed
            ),
            apply=conflict.apply,
        )
    except MixError as error:
        raise ConfigError(str(error)) from None


def _settings(config: RunConfig) -> dict[str, Any]:
    """The policy's own keys; a policy that can keep within epochs is told of those that the draws keep to."""
    mix = config.mix
    kind = POLICIES.get(mix.policy)
    if kind is None or mix.max_epochs is None or "max_epochs" not in settings_of(kind):
        return dict(mix.settings)
    return {"max_epochs": mix.max_epochs, **mix.settings}
