"""Settings: nested frozen dataclasses, read from TOML and --set, checked, and written into every record.

A component (strategy, stream, encoder) is a name and that component's own Config dataclass; the registry finds the class.
"""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cl_sim import registry
from cl_sim.errors import BadConfig

COMPONENTS = ("strategy", "stream", "encoder")
LANES = 30  # CUDA streams for stacks that take turns; torch hands out 32, and one is for copies from the host


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When the engine measures."""

    per_task: int = 10  # small evaluations per task, the full one at its end included; 0: only the full ones
    prequential: int = 10  # steps between test-then-train measurements (1: every batch; 0: never)

    def __post_init__(self) -> None:
        at_least(self, per_task=0, prequential=0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component: its name and its own settings."""

    name: str
    config: Any


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's numbers, and how it is saved."""

    strategy: Part
    stream: Part
    encoder: Part
    seeds: tuple[int, ...] = (0,)  # one run each
    augment: tuple[str, ...] = ()  # training views, in order, e.g. shift:4, flip
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    stack: int = 1  # runs trained as one, side by side
    abreast: int = 1  # stacks that one process trains in turns; on a GPU each on a CUDA stream of its own
    threads: int = 1  # CPU threads per process
    precision: Literal["float32", "bf16"] = "float32"  # of what the encoder computes; all else stays in float32
    capture: bool = False  # on a GPU: replay steady steps as one CUDA graph
    device: str = "cpu"  # cpu, cuda or cuda:N
    data: str = ""  # folder with the data sets; empty: CL_SIM_DATA, then the user's cache folder
    flush_every: int = 50  # steps between reads of the logs
    save_every: int = 1000  # steps between checkpoints

    def __post_init__(self) -> None:
        at_least(self, stack=1, abreast=1, threads=1, flush_every=1, save_every=1)
        if self.capture and not self.device.startswith("cuda"):
            raise BadConfig(f"capture is on, but a run on device '{self.device}' has no CUDA graphs; leave it out")
        if self.device.startswith("cuda") and self.abreast > LANES:
            raise BadConfig(
                f"abreast is {self.abreast}, but a process has CUDA streams for {LANES}; use --stack for more"
            )
        if self.abreast > 1 and len(self.seeds) <= self.stack:
            raise BadConfig(
                f"abreast is {self.abreast}, but {len(self.seeds)} seeds with a stack of {self.stack} are one group, which has "
                "none to take turns with; use a smaller --stack, or leave --abreast out"
            )
        if not self.seeds:
            raise BadConfig("seeds is empty; give at least one: --seeds 0-4")
        if len(set(self.seeds)) < len(self.seeds):
            raise BadConfig(f"seeds {list(self.seeds)} names one twice; each seed is one run: --seeds 0-4")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in a TOML file; `from_dict` reads them back."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in COMPONENTS:
            part: Part = whole[key]
            whole[key] = {"name": part.name, **asdict(part.config)}
        whole["evaluate"] = asdict(self.evaluate)
        return {key: plain(value) for key, value in whole.items()}


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """Build the whole configuration, with checks.    Raises: BadConfig, UnknownName."""
    settings = dict(settings)
    for key in COMPONENTS:
        if key not in settings:
            raise BadConfig(f"the settings name no {key}; add [{key}] with name = ... or give it on the command line")
        own = dict(settings[key])
        name = str(own.pop("name"))
        cls = registry.config_class(key, name)
        settings[key] = Part(name=name, config=build(cls, own, key))
    settings["evaluate"] = build(EvaluateConfig, settings.get("evaluate", {}), "evaluate")
    made: RunConfig = build(RunConfig, settings, "")
    return made


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass from plain values; unknown keys and wrong types are errors.    Raises: BadConfig."""
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    made = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise BadConfig(f"no setting is called '{dotted}'; {hint}Allowed here: {', '.join(known)}")
        made[key] = coerce(value, hints[key], dotted)
    try:
        return cls(**made)
    except TypeError as error:
        raise BadConfig(f"settings of {where or 'the run'}: {error}") from error


def coerce(value: Any, wanted: Any, where: str) -> Any:
    """A value as the annotated type: numbers, text, yes/no, tuples, Literals.    Raises: BadConfig."""
    if is_dataclass(wanted) and isinstance(value, wanted):  # type: ignore[arg-type]
        return value
    origin, args = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        if value in args:
            return value
        raise BadConfig(f"{where} is '{value}'; allowed are {', '.join(str(a) for a in args)}")
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, args, where)
    if origin is tuple:
        if isinstance(value, str):
            value = [word for word in value.split(",") if word]
        if not isinstance(value, Sequence):
            value = [value]
        return tuple(coerce(_literal(item) if args[0] is not str else item, args[0], where) for item in value)
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, str | int | float):
        return str(value)
    raise BadConfig(f"{where} is {value!r}; it must be {_words(wanted)}")


def _first_that_fits(value: Any, kinds: Sequence[Any], where: str) -> Any:
    for kind in kinds:
        try:
            return coerce(value, kind, where)
        except BadConfig:
            continue
    raise BadConfig(f"{where} is {value!r}; it must be {' or '.join(_words(kind) for kind in kinds)}")


def _words(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def plain(value: Any) -> Any:
    """Nested values with lists for tuples, as in a TOML file."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def has_setting(kind: str, name: str, key: str) -> bool:
    """Does this component have a setting of that name?"""
    return key in {f.name for f in fields(registry.config_class(kind, name))}


def at_least(config: Any, **minima: float) -> None:
    """Raise BadConfig for a field below its minimum."""
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value < minimum:
            raise BadConfig(f"{name} is {value}; it must be at least {minimum}")


def within(config: Any, low: float, high: float, *names: str) -> None:
    """Raise BadConfig for a field outside [low, high]."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise BadConfig(f"{name} is {value}; it must lie between {low} and {high}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested values.    Raises: BadConfig if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadConfig(f"no settings file at {path}; see cl-sim run --help for an example") from None
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(f"{path} is not valid TOML: {error}") from None


def _literal(text: Any) -> Any:
    """A word of the command line as TOML would read it; text if it is none."""
    if not isinstance(text, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assign(settings: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=value` to nested settings, in place.    Raises: BadConfig."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise BadConfig(f"--set takes KEY=VALUE, not '{assignment}'; e.g. --set strategy.capacity=1000")
    here = settings
    for key in keys[:-1]:
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            raise BadConfig(f"--set {path}: '{key}' is a value, it has no settings of its own")
    here[keys[-1]] = _literal(text.strip())


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, the second one winning."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
