"""Name -> class. Strategies and streams are found by file name or entry point and imported only when asked for.

A name may carry an argument: `avalanche:Replay` is the strategy `avalanche` with its first setting 'Replay', and
`split-cifar10` is the stream `split` with data 'cifar10', `few_labels-split-cifar10` the stream `few_labels` of that one.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple

from cl_sim.errors import BadConfig, UnknownName
from cl_sim.strategy import Strategy

PACKAGES = {"strategy": "strategies", "stream": "streams"}


class Found(NamedTuple):
    """A component's short name and the settings that its full name carried."""

    name: str
    settings: dict[str, str]


def names(kind: str) -> list[str]:
    """All registered names of a kind ('strategy', 'stream', 'encoder'), without importing the components."""
    if kind == "encoder":
        from cl_sim import encoders

        return encoders.names()
    return sorted({*_files(kind), *_points(kind)})


def _files(kind: str) -> list[str]:
    package = importlib.import_module(PACKAGES[kind])
    return [file.stem for folder in package.__path__ for file in Path(folder).glob("[!_]*.py")]


def _points(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"cl_sim.{PACKAGES[kind]}")}


def resolve(kind: str, full: str) -> Found:
    """Split a name as typed into the registered name and the settings it carries.    Raises: UnknownName."""
    known = names(kind)
    if full in known or kind == "encoder":
        return Found(full, {})
    short, mark, rest = full.partition(":") if kind == "strategy" else full.partition("-")
    if short in known and rest:
        first = next(iter(_settings(load(kind, short))), "")
        if kind == "strategy" or first in ("data", "benchmark", "of"):
            return Found(short, {first: rest})
        raise BadConfig(f"{kind} '{short}' takes no name after the '{mark}'; type just '{short}'")
    raise UnknownName(kind, full, known, f"cl-sim list {PACKAGES[kind]}")


def _settings(cls: Any) -> list[str]:
    return [f.name for f in fields(cls.Config)]


def load(kind: str, name: str) -> Any:
    """The class registered under a name.    Raises: UnknownName."""
    if name in _files(kind):
        return _only_class(importlib.import_module(f"{PACKAGES[kind]}.{name}"), kind)
    points = _points(kind)  # reads the metadata of every installed package
    if name in points:
        return points[name].load()
    raise UnknownName(kind, name, names(kind), f"cl-sim list {PACKAGES[kind]}")


def _only_class(module: Any, kind: str) -> Any:
    """The one class of a component's file: for strategies the Strategy, for streams the class with a Config and batch."""
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    if kind == "strategy":
        own = [c for c in own if issubclass(c, Strategy)]
    else:
        own = [c for c in own if hasattr(c, "Config") and hasattr(c, "batch")]
    if len(own) != 1:
        raise BadConfig(f"{module.__file__} must define exactly one {kind} class, it has {len(own)}")
    return own[0]


def config_class(kind: str, name: str) -> type:
    """The settings dataclass of a component."""
    if kind == "encoder":
        from cl_sim import encoders

        return encoders.config_class(name)
    config: type = load(kind, name).Config
    return config
