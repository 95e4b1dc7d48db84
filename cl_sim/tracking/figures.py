"""An empty figure that needs no screen, and how figures are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def blank(width: float, height: float) -> Any:
    """A matplotlib figure without axes.    Units: inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write a figure as a picture."""
    figure.savefig(path, dpi=140)
    return path
