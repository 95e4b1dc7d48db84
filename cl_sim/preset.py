"""Presets: `<strategy>-<setting>` or `<strategy>-<setting>-m<capacity>`, made from the files in presets/.

A file describes a setting (stream, encoder, the memory sizes that are compared in it, the strategies it is meant for, and
under [strategy.NAME] what one of them changes there). `er-cifar10-m200` is `er` in `cifar10.toml` with capacity 200.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_sim import config
from cl_sim.errors import UnknownName

FOLDER = Path(__file__).parent / "presets"


def names() -> list[str]:
    """Every preset's name."""
    return list(_all())


def about() -> dict[str, str]:
    """Every preset's name and what it is: the first line of the setting's file, with the memory size."""
    said = {}
    for name, (path, _, capacity) in _all().items():
        first = path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")
        said[name] = first + (f", memory of {capacity}" if capacity else "")
    return said


def read(name: str) -> dict[str, Any]:
    """The settings of a preset.    Raises: UnknownName."""
    known = _all()
    if name not in known:
        raise UnknownName("preset", name, known, "cl-sim list presets")
    path, strategy, capacity = known[name]
    settings = config.read_toml(path)
    own = settings.pop("strategy", {}).get(strategy, {})
    del settings["memories"], settings["strategies"]
    size = {"capacity": capacity} if capacity else {}
    return {**settings, "strategy": {"name": strategy, **own, **size}}


def _all() -> dict[str, tuple[Path, str, int]]:
    """Name -> file, strategy, capacity (0: the strategy has no memory)."""
    found = {}
    for path in sorted(FOLDER.glob("*.toml")):
        settings = config.read_toml(path)
        for strategy in settings["strategies"]:
            sizes = settings["memories"] if config.has_setting("strategy", strategy, "capacity") else [0]
            for size in sizes:
                end = f"-m{size}" if size else ""
                found[f"{strategy.replace('_', '-')}-{path.stem}{end}"] = (path, strategy, size)
    return found
