"""Worlds in which a mix of sources lowers the losses of abilities by a known law, float64, in milliseconds.

`simulate(world, policy)` lets a policy steer one as `fastsft run` would: it is told entries with noise, and decides.
"""

import numpy as np
from scipy.optimize import minimize

from fastsft.tasks import Feedback, Mix, MixTask, Source

THOUSAND = 1000


class World:
    """L_j = c_j + a_j (1 + sum_i transfer_ji tokens_i / known_j)^-b_j + sum_i harm_ji tokens_i, tokens in thousands.

    Tokens count by the learning rate, which falls to a tenth. An entry is what the source did, exactly, and noise like
    that of mini-batches: it grows with the root of the source's tokens, and falls with the learning rate.
    """

    def __init__(self, a, b, c, transfer, known, harm=None, *, noise=0.5, decisions=30, budget=300.0):
        self.a, self.b, self.c = (np.array(each, dtype=float) for each in (a, b, c))
        self.transfer, self.known = np.array(transfer, dtype=float), np.array(known, dtype=float)
        self.harm = np.zeros_like(self.transfer) if harm is None else np.array(harm, dtype=float)
        self.decisions, self.budget = decisions, budget
        rate = 0.1 + 0.9 * (1 - (np.arange(decisions) + 0.5) / decisions)
        self.rate = rate / rate.mean()
        J, K = self.transfer.shape
        self.noise = noise * 0.006 * self.a.mean() * np.sqrt(30 / decisions)
        self.sources = [f"s{at}" for at in range(K)]
        self.abilities = [f"a{at}" for at in range(J)]
        self.start = np.zeros(K)
        self.initial = self.losses(self.start)

    def task(self, seed=0, tokens=10**9):
        own = [f"a{at}" if at < len(self.abilities) else None for at in range(len(self.sources))]
        sources = tuple(
            Source(name=name, ability=ability, rows=tokens // 100, tokens=tokens)
            for name, ability in zip(self.sources, own, strict=True)
        )
        return MixTask(sources=sources, abilities=tuple(self.abilities), steps=self.decisions * 10, batch=16, seed=seed)

    def losses(self, exposure):
        learnt = 1 + (self.transfer @ exposure) / self.known
        return self.c + self.a * learnt**-self.b + self.harm @ exposure

    def objective(self, exposure):
        return float((self.losses(exposure) / self.initial).mean())

    def static(self, mix):
        return self.objective(self.budget * np.asarray(mix))

    def oracle(self):
        """The best static mix, by search without noise, and its objective."""

        def value(logs):
            mix = np.exp(logs - logs.max())
            return self.static(mix / mix.sum())

        starts = [np.zeros(len(self.sources)), *np.random.default_rng(0).normal(0, 1.5, (3, len(self.sources)))]
        best = min(
            (minimize(value, s, method="L-BFGS-B", bounds=[(-8, 8)] * len(s)) for s in starts), key=lambda f: f.fun
        )
        mix = np.exp(best.x - best.x.max())
        return mix / mix.sum(), best.fun

    def interval(self, exposure, mix, at, rng):
        """Draw a decision's worth: (exposure after, entries [J, K], tokens in thousands [K])."""
        tokens = mix * self.budget / self.decisions
        entries = np.zeros_like(self.transfer)
        for _ in range(4):
            step = tokens * self.rate[at] / 4
            learnt = 1 + self.transfer @ (exposure + step / 2) / self.known
            slope = -self.a * self.b / self.known * learnt ** (-self.b - 1)
            entries += (slope[:, None] * self.transfer + self.harm) * step
            exposure = exposure + step
        scale = self.noise * self.rate[at] * np.sqrt(tokens / (self.budget / self.decisions / 4))
        return exposure, entries + scale * rng.normal(size=entries.shape), tokens


class Conflict:
    """Sources pull weights w [D] each to its own centre, abilities measure how far w is from theirs: L_j quadratic.

    Gradient descent with noise like that of mini-batches; entries are the exact displacement of each source dotted with
    gradients at both ends. `slow` spreads curvatures over directions: what is learnt along flat ones pays only late.
    """

    def __init__(self, seed, contrary, slow, *, noise=0.5, decisions=30, budget=300.0):
        rng, D, J = np.random.default_rng(seed), 24, 4
        self.targets = 0.5 * rng.normal(size=D) + rng.normal(size=(J, D))
        self.centres = self.targets + 0.2 * rng.normal(size=(J, D))
        self.curvature = np.exp(slow * rng.normal(size=(J, D)) + 0.6 * rng.normal(size=(J, 1)))
        self.pull = self.curvature
        if contrary:  # one source more, that teaches the opposite of the first
            self.centres = np.vstack([self.centres, -self.targets[0]])
            self.pull = np.vstack([self.curvature, np.ones(D)])
        self.floor = rng.uniform(0.5, 4, J)
        self.noise, self.decisions, self.budget = noise, decisions, budget
        self.rate = 0.02 * (0.1 + 0.9 * (1 - (np.arange(decisions) + 0.5) / decisions)) / 0.55
        self.sources, self.abilities = [f"s{at}" for at in range(len(self.centres))], [f"a{at}" for at in range(J)]
        self.start = np.zeros(D)
        self.initial = self.losses(self.start)

    task = World.task

    def losses(self, w):
        return self.floor + 0.5 * (self.curvature * (w - self.targets) ** 2).sum(1)

    def objective(self, w):
        return float((self.losses(w) / self.initial).mean())

    def static(self, mix, seed=0):
        w, rng = self.start, np.random.default_rng(seed)
        for at in range(self.decisions):
            w, _, _ = self.interval(w, np.asarray(mix), at, rng)
        return self.objective(w)

    def interval(self, w, mix, at, rng):
        first, moved = self.curvature * (w - self.targets), np.zeros_like(self.centres)
        for _ in range(8):
            gradient = self.pull * (w - self.centres)
            gradient = gradient + self.noise * 0.5 / np.sqrt(8 * mix + 0.05)[:, None] * rng.normal(size=gradient.shape)
            step = -self.rate[at] * mix[:, None] * gradient
            moved, w = moved + step, w + step.sum(0)
        mean = (first + self.curvature * (w - self.targets)) / 2
        return w, mean @ moved.T, mix * self.budget / self.decisions


def simulate(world, policy, seed=0, task=None, told=None):
    """Let a policy steer a world: (objective at the end, mixes [decisions + 1, K], decisions)."""
    rng = np.random.default_rng(seed)
    mix = policy.begin(task or world.task())
    state, used, mixes, decisions = world.start, np.zeros(len(world.sources)), [], []
    losses = world.initial
    for at in range(world.decisions):
        now = np.array([mix.weights[name] for name in world.sources])
        mixes.append(now)
        state, entries, tokens = world.interval(state, now, at, rng)
        used, before, losses = used + tokens, losses, world.losses(state)
        feedback = feedback_of(world, at, entries, tokens, used, before, losses, now)
        if told is not None:
            told.append(feedback)
        decision = policy.decide(feedback)
        decisions.append(decision)
        mix = Mix(decision.weights)
    mixes.append(np.array([mix.weights[name] for name in world.sources]))
    return world.objective(state), np.array(mixes), decisions


def feedback_of(world, at, entries, tokens, used, before, losses, mix):
    def by_ability(values):
        return dict(zip(world.abilities, np.asarray(values).tolist(), strict=True))

    def by_source(values):
        return dict(zip(world.sources, np.asarray(values).tolist(), strict=True))

    return Feedback(
        step=(at + 1) * 10,
        first=at * 10,
        progress=(at + 1) / world.decisions,
        initial=by_ability(world.initial),
        losses=by_ability(losses),
        errors=by_ability(0.01 * world.initial),
        measured=by_ability(losses - before),
        entries={ability: by_source(row) for ability, row in zip(world.abilities, entries, strict=True)},
        tokens=by_source(np.round(THOUSAND * tokens).astype(int)),
        credited=by_source(np.round(THOUSAND * tokens).astype(int)),
        used=by_source(np.round(THOUSAND * used).astype(int)),
        weights=by_source(mix),
        train_losses=by_source(np.full(len(world.sources), float(losses.mean()))),
    )


def closed(world, objective):
    """Share of the gap from uniform to the best static mix that is closed."""
    K = len(world.sources)
    uniform, (_, best) = world.static(np.full(K, 1 / K)), world.oracle()
    return (uniform - objective) / (uniform - best)


def worlds(noise=0.5, decisions=30):
    """The worlds of the study, by name; in the last two nothing can be gained over uniform."""
    own, with_extra = np.eye(4), np.hstack([np.eye(4), np.zeros((4, 1))])
    transfer = np.eye(4)
    transfer[0, 1], transfer[1, 0], transfer[2, 3], transfer[1, 3] = 0.5, 0.3, 0.4, 0.3
    harm = np.zeros((4, 5))
    harm[0, 4], harm[1, 4] = 0.002, 0.001
    rng = np.random.default_rng(3)
    eight = [rng.uniform(0.3, 1.5, 8), rng.uniform(0.2, 1.5, 8), rng.uniform(0.2, 1, 8)]
    eight += [np.eye(8) + 0.1 * rng.random((8, 8)), np.exp(rng.uniform(1, 5, 8))]
    uneven, alike = [1, 1, 0.8, 0.6], ([1] * 4, [0.5] * 4, [0.5] * 4)
    floor = [0.5, 0.5, 1, 0.4]
    told = {"noise": noise, "decisions": decisions}
    return {
        "separable": World(uneven, [1.5, 0.5, 0.4, 1], floor, own, [4, 40, 25, 120], **told),
        "transfer": World(uneven, [1.5, 0.5, 0.4, 1], floor, transfer, [4, 40, 25, 120], **told),
        "useless": World(uneven, [0.5, 0.7, 0.4, 0.7], floor, with_extra, [10] * 4, **told),
        "harmful": World(uneven, [0.5, 0.7, 0.4, 0.7], floor, with_extra, [10] * 4, harm, **told),
        "saturating": World([1.5, 1, 1], [3, 0.5, 0.5], [0.2, 0.6, 0.6], np.eye(3), [5, 30, 30], **told),
        "late": World([1, 1], [0.5, 1.5], [0.3, 0.5], np.eye(2), [60, 4], **told),
        "eight": World(*eight, **told),
        "no gain": World(*alike, own, [10] * 4, **told),
        "no gain, all transfer": World(*alike, 0.7 * own + 0.3, [10] * 4, **told),
    }


def told(sources=("a", "b"), abilities=("a", "b"), **changed):
    """A feedback of one interval: every source got a thousand tokens and moved nothing, but for what is changed."""
    K = len(sources)
    given = {
        "step": 10,
        "first": 0,
        "progress": 0.25,
        "initial": dict.fromkeys(abilities, 2.0),
        "losses": dict.fromkeys(abilities, 1.0),
        "errors": dict.fromkeys(abilities, 0.1),
        "measured": dict.fromkeys(abilities, -0.1),
        "entries": {ability: dict.fromkeys(sources, 0.0) for ability in abilities},
        "tokens": dict.fromkeys(sources, THOUSAND),
        "used": dict.fromkeys(sources, THOUSAND),
        "weights": dict.fromkeys(sources, 1 / K),
    }
    # no momentum, unless a test says so
    return Feedback(**{"credited": changed.get("tokens", given["tokens"]), **given, **changed})


def task(sources=("a", "b"), abilities=("a", "b"), own=None, tokens=None, seed=0):
    """A task of sources, each of the ability of its name where there is one."""
    own = own or {name: name for name in sources if name in abilities}
    return MixTask(
        sources=tuple(
            Source(name=name, ability=own.get(name), rows=10, tokens=(tokens or {}).get(name, THOUSAND))
            for name in sources
        ),
        abilities=tuple(abilities),
        steps=40,
        batch=16,
        seed=seed,
    )
