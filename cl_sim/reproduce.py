"""Does a rerun agree with the result that is filed for it?

The rule, by metric. Every seed of the rerun is among the stored ones: the numbers are `identical` if no seed's differ; else the
95 % interval of the paired differences decides, which must contain 0. Other seeds: the two intervals decide, as in Welch's
test; the means may differ by at most sqrt(stored half-width^2 + new half-width^2). Where an interval is needed and a single
seed gives none, nothing can be said: `cannot tell`, which does not count as agreement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from cl_sim import config, registry
from cl_sim.config import RunConfig
from cl_sim.errors import BadConfig, ClSimError
from cl_sim.report import Estimate, Result, interval, shown

METRICS = (
    *("acc_end", "acc_aaa", "forgetting_chaudhry"),  # of classes
    *("hr10_prequential", "ndcg10_prequential", "hr10_test", "ndcg10_test"),  # of items
    *("assa_end", "idf1_end", "linear_end", "linear_aaa", "knn_end", "shot1_end", "shot5_end"),  # clips, embeddings
)
WITHOUT_EFFECT = (
    "seeds",
    "abreast",
    "data",
    "flush_every",
    "save_every",
)  # which runs, in turns or not, where and when written

Word = Literal["identical", "agrees", "differs", "cannot tell"]


@dataclass(frozen=True)
class Verdict:
    """What a rerun says of one stored number; `difference` is new minus stored."""

    stored: Estimate
    new: Estimate
    difference: Estimate
    word: Word

    @property
    def agrees(self) -> bool:
        """Is the stored number confirmed?"""
        return self.word in ("identical", "agrees")


def judge(stored: Mapping[int, float], new: Mapping[int, float]) -> Verdict:
    """The verdict on one metric, from its value by seed in both."""
    one, two = interval(list(stored.values())), interval(list(new.values()))
    if new and set(new) <= set(stored):
        gaps = [value - stored[seed] for seed, value in sorted(new.items())]
        difference = interval(gaps)
        if not any(gaps):
            return Verdict(one, two, difference, "identical")
    else:
        difference = Estimate(two.mean - one.mean, math.hypot(one.half, two.half), min(one.n, two.n))
    if math.isnan(difference.half):
        return Verdict(one, two, difference, "cannot tell")
    return Verdict(one, two, difference, "agrees" if abs(difference.mean) <= difference.half else "differs")


def verdicts(stored: Result, new: Result) -> dict[str, Verdict]:
    """A verdict for each metric that either has."""
    pairs = {metric: (by_seed(stored, metric), by_seed(new, metric)) for metric in METRICS}
    return {metric: judge(*pair) for metric, pair in pairs.items() if any(pair)}


def by_seed(result: Result, metric: str) -> dict[int, float]:
    """Seed -> value, where there is one."""
    values = result["metrics"].get(metric, [None] * len(result["seeds"]))
    return {seed: value for seed, value in zip(result["seeds"], values, strict=True) if value is not None}


def table(found: Mapping[str, Verdict]) -> list[list[str]]:
    """Header and one row per metric, in percent."""
    rows = [["metric", "stored", "new", "difference", "verdict"]]
    for metric, verdict in found.items():
        gap = verdict.difference
        spread = "" if math.isnan(gap.half) else f" ± {100 * gap.half:.2f}"
        difference = "-" if math.isnan(gap.mean) else f"{100 * gap.mean:+.2f}{spread}"
        rows.append([metric, shown(metric, verdict.stored), shown(metric, verdict.new), difference, verdict.word])
    return rows


def filed(folder: Path, name: str, key: tuple[str, str]) -> Path:
    """Where `cl-sim report` has filed a preset's result: by its stream and entry, or under whatever name it was given."""
    usual = _usual(folder, key)
    return usual if usual.is_file() else _made_by_preset(folder).get(name, usual)


def _usual(folder: Path, key: tuple[str, str]) -> Path:
    stream, entry = key
    return folder / stream / f"{entry}.json"


def _made_by_preset(folder: Path) -> dict[str, Path]:
    """Preset -> the first result whose command ran it as it is. Every result is read."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*.json")):
        words = str(json.loads(path.read_text(encoding="utf-8")).get("command", "")).split()
        if "--set" not in words:
            for before, name in pairwise(words):
                if before == "--preset":
                    found.setdefault(name, path)
    return found


def stored_result(name: str, folder: Path, keys: Mapping[str, tuple[str, str]]) -> Result:
    """The result filed for a preset; `keys` says for every preset where that is.    Raises: ClSimError if there is none."""
    path = filed(folder, name, keys[name])
    if not path.is_file():
        raise ClSimError(
            f"preset '{name}' has no stored result ({path} is missing); {_those_with_one(folder, keys)}. Make one with: "
            f"cl-sim run --preset {name} --seeds 0-4, then cl-sim report RUN --folder {folder}"
        )
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    if not any(by_seed(result, metric) for metric in METRICS):
        raise ClSimError(f"{path} has none of {', '.join(METRICS)}, so there is nothing to compare; use cl-sim compare")
    return result


def _those_with_one(folder: Path, keys: Mapping[str, tuple[str, str]]) -> str:
    elsewhere = _made_by_preset(folder)
    there = [name for name, key in keys.items() if _usual(folder, key).is_file() or name in elsewhere]
    return f"these presets have one: {', '.join(there)}" if there else f"no preset has one in {folder}"


def changed(stored: Result, now: RunConfig, facts: Mapping[str, str]) -> list[str]:
    """What is not as it was, in words: settings, and of `facts` what the result records under the same name.

    A setting that the stored result does not know yet is taken to have had its default. Digests are cut to 8 characters.
    """
    before, after = _flat(_with_defaults(stored["config"], now)), _flat(now.to_dict())
    words = [
        f"{key} {_said(before, key)} (now {_said(after, key)})"
        for key in dict.fromkeys([*after, *before])
        if key not in WITHOUT_EFFECT and before.get(key, MISSING) != after.get(key, MISSING)
    ]
    known = {**stored, **stored["versions"]}
    for key, value in facts.items():
        if known.get(key) != value:
            length = 8 if key.endswith("digest") else None
            words.append(f"{key} {str(known.get(key))[:length]} (now {value[:length]})")
    return words


def _with_defaults(stored: Mapping[str, Any], now: RunConfig) -> dict[str, Any]:
    filled = config.merge(_defaults(type(now)), stored)
    for kind in config.COMPONENTS:
        filled[kind] = _settled(kind, stored[kind])
    return filled


def _settled(kind: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """A component's settings with what it fills in itself, such as the usual number of tasks, if it still takes them."""
    cls, own = registry.config_class(kind, stored["name"]), {key: stored[key] for key in stored if key != "name"}
    try:
        return {"name": stored["name"], **config.plain(asdict(config.build(cls, own, kind)))}
    except BadConfig:
        return config.merge(_defaults(cls), stored)


def _defaults(cls: type) -> dict[str, Any]:
    plain = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found


def _said(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "not there")
    return ",".join(str(item) for item in value) or "none" if isinstance(value, list) else str(value)
