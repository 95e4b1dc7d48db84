"""Presets: `<strategy>-<setting>` or `<strategy>-<setting>-m<capacity>`, made from the files in presets/.

A file describes a setting (stream, encoder, the memory sizes that are compared in it, the strategies it is meant for, and
under [strategy.NAME] what one of them changes there). `er-cifar10-m200` is `er` in `cifar10.toml` with capacity 200.

Several variants of one strategy are the arms of a setting: [arms.saa-er] with `strategy = "er"` and what is set there makes
the preset `saa-er-<setting>`. Their results are filed in a folder named after the setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cl_sim import config
from cl_sim.errors import UnknownName

FOLDER = Path(__file__).parent / "presets"


class Entry(NamedTuple):
    """Where a preset is written down."""

    path: Path
    strategy: str
    capacity: int  # 0: the strategy has no memory, or its size is a setting like others
    arm: str  # "" if it is none


def names() -> list[str]:
    """Every preset's name."""
    return list(_all())


def about() -> dict[str, str]:
    """Every preset's name and what it is: the first line of the setting's file, with the memory size."""
    said = {}
    for name, entry in _all().items():
        first = entry.path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")
        said[name] = first + (f", memory of {entry.capacity}" if entry.capacity else "")
    return said


def read(name: str) -> dict[str, Any]:
    """The settings of a preset.    Raises: UnknownName."""
    entry = _entry(name)
    settings = config.read_toml(entry.path)
    own = settings.pop("strategy", {}).get(entry.strategy, {})
    arm = dict(settings.pop("arms", {}).get(entry.arm, {}))
    arm.pop("strategy", None)
    del settings["memories"], settings["strategies"]
    size = {"capacity": entry.capacity} if entry.capacity else {}
    return {**settings, "strategy": {"name": entry.strategy, **own, **arm, **size}}


def filed(name: str) -> tuple[str, str] | None:
    """Folder and name of an arm's result; None for other presets, which are filed by stream and strategy."""
    entry = _entry(name)
    end = f"-m{entry.capacity}" if entry.capacity else ""
    return (entry.path.stem, entry.arm + end) if entry.arm else None


def _entry(name: str) -> Entry:
    known = _all()
    if name not in known:
        raise UnknownName("preset", name, known, "cl-sim list presets")
    return known[name]


def _all() -> dict[str, Entry]:
    """Name -> where it is written down."""
    found = {}
    for path in sorted(FOLDER.glob("*.toml")):
        settings = config.read_toml(path)
        variants = [(strategy.replace("_", "-"), strategy, "") for strategy in settings["strategies"]]
        variants += [(arm, own["strategy"], arm) for arm, own in settings.get("arms", {}).items()]
        for start, strategy, arm in variants:
            sized = settings["memories"] and config.has_setting("strategy", strategy, "capacity")
            for size in settings["memories"] if sized else [0]:
                end = f"-m{size}" if size else ""
                found[f"{start}-{path.stem}{end}"] = Entry(path, strategy, size, arm)
    return found
