"""Data sets as arrays: found, decoded once, cached under a content hash, memory-mapped, and gathered on the device.

Where a set comes from is `sources.py`; here is what happens to it then.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.ahead import Ahead
from cl_sim.errors import BadData

Progress = Callable[[int, int], None]  # images decoded, images in all
ROOM_SHARE = 0.5  # of a GPU's free memory that a data set may take


@dataclass(frozen=True)
class Arrays:
    """One part of a set.    Shapes: x uint8 [N, C, H, W] or float32 [N, F], y int64 [N]."""

    x: NDArray[Any]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class DataSet:
    """A training part, a test part if there is one, the classes' names, and a hash of the content."""

    name: str
    train: Arrays
    test: Arrays | None
    classes: tuple[str, ...]
    digest: str


def quiet(done: int, total: int) -> None:
    """Show no progress."""


def load(name: str, folder: str = "", *, size: int = 0, labels: str = "", progress: Progress = quiet) -> DataSet:
    """A set by name, or the user's own as folder:PATH, parquet:PATH, npz:PATH or csv:PATH.

    `size` resizes images to size x size pixels; `labels` replaces the labels by another column (COLUMN of the set's own
    table, or FILE:COLUMN for the training part).

    Raises: UnknownName; BadData naming file and row.
    """
    from cl_sim import sources

    source = sources.find(name, folder, labels)
    recipe = hashlib.sha256(f"2/{source.content_hash()}/{size}".encode()).hexdigest()[:32]
    place = cache_folder() / "arrays" / f"{name.split(':')[0]}-{recipe}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not _complete(place):
            _write(place, source.read(size, progress))
        return _mapped(place, name)


def cache_folder() -> Path:
    """Where decoded arrays are kept: CL_SIM_CACHE, else the user's cache folder."""
    own = os.environ.get("CL_SIM_CACHE")
    return Path(own) if own else user_cache()


def user_cache() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cl-sim"


def _write(place: Path, data: DataSet) -> None:
    """Write a folder of arrays under a draft name, then rename it."""
    draft = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    _remove(draft)
    _remove(place)
    draft.mkdir(parents=True)
    parts = {"train": data.train} | ({"test": data.test} if data.test is not None else {})
    try:
        for part, arrays in parts.items():
            for key, array in (("x", arrays.x), ("y", arrays.y)):
                with (draft / f"{part}-{key}.npy").open("wb") as file:
                    np.save(file, np.ascontiguousarray(array))
                    file.flush()
                    os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        about = {"classes": list(data.classes), "digest": digest_of(parts), "sizes": sizes}
        (draft / "about.json").write_text(json.dumps(about), encoding="utf-8")
        draft.rename(place)
    finally:
        _remove(draft)


def digest_of(parts: dict[str, Arrays]) -> str:
    """SHA-256 over the shapes and bytes of every part, shortened to 32 digits."""
    found = hashlib.sha256()
    for part, arrays in sorted(parts.items()):
        for array in (arrays.x, arrays.y):
            found.update(f"{part}{array.shape}{array.dtype}".encode())
            found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:32]


def _remove(folder: Path) -> None:
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _complete(place: Path) -> bool:
    """Is everything there, in the size it was written?"""
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in about["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _mapped(place: Path, name: str) -> DataSet:
    """The cached arrays, memory-mapped copy-on-write (torch warns about read-only memory; nobody writes)."""
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))

    def part(which: str) -> Arrays:
        return Arrays(x=np.load(place / f"{which}-x.npy", mmap_mode="c"), y=np.load(place / f"{which}-y.npy"))

    test = part("test") if "test-x.npy" in about["sizes"] else None
    return DataSet(name=name, train=part("train"), test=test, classes=tuple(about["classes"]), digest=about["digest"])


class Resident:
    """Rows that can be gathered on a device.

    On a CPU they stay memory-mapped. On a GPU they move there whole if there is room, else they stay mapped, too, and come
    batch by batch, ahead of their steps.
    """

    def __init__(self, x: NDArray[Any], device: torch.device) -> None:
        rows = torch.from_numpy(np.asarray(x))
        self.device = device
        self.on_device = rows.nbytes <= room(device)  # do the rows rest there?
        self.rows = rows.to(device) if self.on_device else rows

    def gather(self, index: Tensor) -> Tensor:
        """Pick rows. Where they do not rest on the device the host waits for it to read their numbers.

        Shapes: index [R, B] -> [R, B, *shape].
        """
        picked = self.rows.index_select(0, index.reshape(-1).to(self.rows.device)).to(self.device)
        return picked.view(*index.shape, *self.rows.shape[1:])

    def ahead(self, numbers: Callable[[int], Tensor], steps: int) -> Ahead | None:
        """The rows of each step, by numbers that the host knows; None where they rest on the device and need only a gather."""
        return None if self.on_device else Ahead(self.rows, self.device, numbers, steps)

    def chunks(self, index: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pick rows, so many at a time, by numbers that the host knows.

        Shapes: index [R, N] on the host -> pairs of index [R, size] and rows [R, size, *shape] on the device.
        """
        known = torch.split(index, size, dim=1)
        there = torch.split(index.to(self.device, non_blocking=True), size, dim=1)
        stream = self.ahead(known.__getitem__, len(known))
        try:
            for number, part in enumerate(there):
                yield part, self.gather(part) if stream is None else stream.take(number)
        finally:
            if stream is not None:
                stream.close()


def room(device: torch.device) -> int:
    """How many bytes of a data set may move to a device; no limit on a CPU, where nothing moves."""
    return int(ROOM_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else sys.maxsize


def check_labels(y: NDArray[np.int64], where: str) -> None:
    """Labels must be 0, 1, 2, ... with no class left out.    Raises: BadData naming a row or the class."""
    if len(y) == 0:
        raise BadData(f"{where} holds no samples")
    if y.min() < 0:
        row = int(np.flatnonzero(y < 0)[0])
        raise BadData(f"{where}, row {row}: label {y[row]} is negative; labels must be 0, 1, 2, ...")
    counts = np.bincount(y)
    if (counts == 0).any():
        missing = int(np.flatnonzero(counts == 0)[0])
        raise BadData(
            f"{where}: class {missing} has no sample, though labels go up to {y.max()}; number the classes 0, 1, 2, ..."
        )
