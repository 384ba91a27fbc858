"""Policies by name, from the `mix` section of a run file: every setting checked, an unknown one refused."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml

from fastsft.mixing.align import Align
from fastsft.mixing.guard import Guard
from fastsft.mixing.odm import Odm
from fastsft.mixing.slope import Slope
from fastsft.mixing.static import Schedule, Static, TwoStage
from fastsft.mixing.velocity import Velocity
from fastsft.tasks import Mix, MixError, MixPolicy

POLICIES: dict[str, type[Any]] = {
    "uniform": Static,
    "static": Static,
    "temperature": Static,
    "schedule": Schedule,
    "two_stage": TwoStage,
    "odm": Odm,
    "velocity": Velocity,
    "align": Align,
    "slope": Slope,
}
# what a name stands for that its class does not say; the value of a setting that is not given
_MEANT: dict[str, dict[str, Any]] = {
    "uniform": {"start": "uniform"},
    "temperature": {"start": "proportional", "temperature": 2.0},
}
_STARTS = ("uniform", "proportional")


def make_policy(
    name: str,
    *,
    start: Mix | str | Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    guard: bool | Mapping[str, Any] = False,
) -> MixPolicy:
    """Make the policy of a run file.

    name: one of POLICIES, or "module:Class" for one's own. start: the mix to begin with, where the policy takes one.
    guard: True, or the settings of `Guard` beside `policy`, puts one around it.
    """
    given = dict(settings or {})
    if ":" in name:
        made = _own(name, start, given)
    else:
        kind = POLICIES.get(name)
        if kind is None:
            known = _near(name, list(POLICIES))
            raise MixError(f"there is no policy {name!r}: {known}, or 'module:Class' for your own.")
        made = _made(name, kind, start, given)
    if guard is False:
        return made
    options = {} if guard is True else dict(guard)
    _check(options, Guard, "guard", ("patience", "standard_errors", "max_epochs"))
    return Guard(made, **options)


def read_start(value: object, root: str | Path | None = None) -> Mix | Literal["uniform", "proportional"] | None:
    """Read a start: uniform, proportional, {source: share}, or a YAML file with `weights`, under `root`.

    `fastsft mix plan` writes such a file. None stays None: the policy's own.
    """
    if value is None or value in _STARTS:
        return value  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return Mix({str(source): share for source, share in value.items()})
    if not isinstance(value, str | Path):
        raise MixError(f"`start` must be {', '.join(_STARTS)}, {{source: share}} or a file's name: got {value!r}.")
    path = Path(root or ".") / value
    if path.suffix not in (".yaml", ".yml"):
        raise MixError(
            f"there is no start {str(value)!r}: {_near(str(value), list(_STARTS))}, {{source: share}}, or a .yaml file "
            f"that `fastsft mix plan` wrote."
        )
    if not path.is_file():
        raise MixError(f"`start` names {path}, which is no file: write it with `fastsft mix plan`, or mend the name.")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MixError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}. Mend that place.") from None
    weights = read.get("weights") if isinstance(read, Mapping) else None
    if not isinstance(weights, Mapping):
        raise MixError(f"{path} must hold `weights: {{source: share}}`, as `fastsft mix plan` writes it.")
    try:
        return Mix({str(source): share for source, share in weights.items()})
    except MixError as error:
        raise MixError(f"{path}: {error}") from None


def _made(name: str, kind: type[Any], start: object, given: dict[str, Any]) -> MixPolicy:
    known = settings_of(kind)
    fixed = _MEANT.get(name, {})
    # a name that says its start has no other
    allowed = [key for key in known if key != "start" and not (name in ("uniform", "static") and key == "temperature")]
    _check(given, kind, name, allowed)
    if start is not None and ("start" not in known or fixed.get("start", start) != start):
        raise MixError(f"the policy {name!r} takes no `start`: leave it out, or name another policy.")
    if name == "static" and start is None:
        raise MixError(
            "the policy 'static' draws by its `start`: give {source: share}, or a file of `fastsft mix plan`."
        )
    if start is not None:
        fixed = {**fixed, "start": start}
    missing = [f.name for f in _fields(kind) if f.name not in (*given, *fixed) and _required(f)]
    if missing:
        raise MixError(f"the policy {name!r} needs the setting `{missing[0]}`.")
    made: MixPolicy = kind(**{**fixed, **given})
    return made


def _own(name: str, start: object, given: dict[str, Any]) -> MixPolicy:
    """Make a policy that someone else wrote; what it takes is read off its signature."""
    module, _, attribute = name.partition(":")
    try:
        kind: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise MixError(
            f"the policy {name!r} can't be loaded ({error}): write it as module:Class, importable."
        ) from None
    if start is not None:
        given = {**given, "start": start}
    try:
        inspect.signature(kind).bind(**given)
    except (TypeError, ValueError) as error:  # no callable, other settings; a builtin without a signature
        raise MixError(f"the policy {name!r} does not take its settings: {error}.") from None
    made = kind(**given)
    if not isinstance(made, MixPolicy):
        raise MixError(f"the policy {name!r} must have `begin(task)` and `decide(feedback)` (fastsft.tasks.MixPolicy).")
    return made


def settings_of(kind: type[Any]) -> list[str]:
    """Name what a policy can be told."""
    return [f.name for f in _fields(kind)]


def _fields(kind: type[Any]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if f.init]


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is f.default_factory is dataclasses.MISSING


def _check(given: Mapping[str, Any], kind: type[Any], name: str, allowed: Sequence[str]) -> None:
    """Refuse settings that the policy has not, and values of the wrong type."""
    hints = get_type_hints(kind)
    for key, value in given.items():
        if key not in allowed:
            raise MixError(f"the policy {name!r} has no setting `{key}`: {_near(key, list(allowed))}.")
        kinds = _types(hints[key])
        if type(value) in kinds or (type(value) is int and float in kinds):
            continue
        wide = tuple(each for each in kinds if each in (Mapping, Sequence))
        if isinstance(value, wide) and not isinstance(value, str):
            continue
        names = " or ".join("nothing" if each is type(None) else _WORDS.get(each, each.__name__) for each in kinds)
        raise MixError(f"`{key}` of the policy {name!r} must be {names}: got {value!r}.")


_WORDS: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "a word",
    bool: "true or false",
    Mapping: "a mapping of names",
    Sequence: "a list",
}


def _types(hint: Any) -> list[Any]:
    """Give the plain types of a hint: float | Mapping[str, float] | None -> [float, Mapping, NoneType]."""
    if get_origin(hint) is UnionType:
        return [each for part in get_args(hint) for each in _types(part)]
    if get_origin(hint) is Literal:
        return [str]
    if get_origin(hint) is ClassVar:
        return []
    return [get_origin(hint) or hint]


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}" if known else "it has none"
