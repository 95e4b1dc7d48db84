"""Who took what, in which order: interaction lists, read from files or made up.

Files are lists (a user per line: the user's number, then the items, oldest first, separated by spaces) or CSV with the columns
user, item and, if there is one, a time.
"""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cl_sim.errors import BadData, UnknownName
from cl_sim.rng import host_rng
from cl_sim.sources import data_folders

FILES = {
    "beauty": "Amazon_Beauty.txt",
    "sports": "Amazon_Sports_and_Outdoors.txt",
    "toys": "Amazon_Toys_and_Games.txt",
}
MADE_UP = "made-up"
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Interactions:
    """Items of user 1, then of user 2 and so on, each user's oldest first; items are numbered from 1.

    Shapes: items [N], lengths [U] (of each user), moments [N] (when, in any unit; None if the file does not say).
    """

    name: str
    items: Ints
    lengths: Ints
    moments: NDArray[np.float64] | None = None

    @property
    def users(self) -> int:
        """How many users there are."""
        return len(self.lengths)

    @property
    def catalogue(self) -> int:
        """The largest item number."""
        return int(self.items.max())

    @property
    def starts(self) -> Ints:
        """Where each user's items begin.    Shapes: -> [U]."""
        begun: Ints = np.cumsum(self.lengths) - self.lengths
        return begun

    @property
    def digest(self) -> str:
        """SHA-256 of the content, shortened to 32 digits."""
        found = hashlib.sha256(self.lengths.tobytes() + self.items.tobytes())
        if self.moments is not None:
            found.update(self.moments.tobytes())
        return found.hexdigest()[:32]


def load(name: str, folder: str = "") -> Interactions:
    """A set by name (beauty, sports, toys, made-up), or the user's own as lists:PATH or csv:PATH.

    Raises: UnknownName; BadData naming file and line.
    """
    form, colon, rest = name.partition(":")
    if colon and form in ("lists", "csv"):
        path = Path(rest).expanduser()
        if not path.is_file():
            raise BadData(f"there is no file {path}; give the path of a file behind '{form}:'")
        return read_lists(name, path) if form == "lists" else read_csv(name, path)
    if name == MADE_UP:
        return made_up()
    if name not in FILES:
        raise UnknownName("data set", name, [*FILES, MADE_UP, "lists:PATH", "csv:PATH"], "cl-sim describe sequences")
    places = [place / part / FILES[name] for place in data_folders(folder) for part in ("recsys", ".")]
    for path in places:
        if path.is_file():
            return read_lists(name, path)
    raise BadData(
        f"the data set '{name}' is not at {places[0]}; put the file there, name another folder with --data DIR, or use your own "
        "file as lists:PATH or csv:PATH"
    )


def read_lists(name: str, path: Path) -> Interactions:
    """A user per line.    Raises: BadData if a line holds no item, other than whole numbers, or users out of order."""
    items: list[int] = []
    lengths: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) < 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise BadData(f"{path}, line {number}: a line is a user and one or more items, whole numbers from 1")
        if int(words[0]) != len(lengths) + 1:
            raise BadData(f"{path}, line {number}: user {words[0]} comes where user {len(lengths) + 1} is due")
        items += [int(word) for word in words[1:]]
        lengths.append(len(words) - 1)
    if not lengths:
        raise BadData(f"{path} holds no interactions")
    return Interactions(name, np.array(items, dtype=np.int64), np.array(lengths, dtype=np.int64))


def read_csv(name: str, path: Path) -> Interactions:
    """Columns user, item and perhaps a time, any words; without a time, rows are taken to be in order.

    A first line that begins with the word user is a heading. Users and items are numbered by first appearance.

    Raises: BadData naming the line.
    """
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    rows: list[tuple[int, float, int]] = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if not cells or (number == 1 and cells[0].strip().lower().startswith("user")):
                continue
            if len(cells) < 2 or not cells[0].strip() or not cells[1].strip():
                raise BadData(f"{path}, line {number}: a row is user,item or user,item,time")
            user = users.setdefault(cells[0].strip(), len(users))
            item = items.setdefault(cells[1].strip(), len(items) + 1)
            rows.append((user, _moment(cells, path, number), item))
    if not rows:
        raise BadData(f"{path} holds no interactions")
    by_user = sorted(range(len(rows)), key=lambda row: (rows[row][0], rows[row][1], row))
    return Interactions(
        name,
        np.array([rows[row][2] for row in by_user], dtype=np.int64),
        np.bincount([user for user, _, _ in rows], minlength=len(users)).astype(np.int64),
        np.array([rows[row][1] for row in by_user], dtype=np.float64),
    )


def _moment(cells: list[str], path: Path, number: int) -> float:
    """The time of a row, or its number if it has none."""
    if len(cells) < 3:
        return float(number)
    try:
        moment = float(cells[2])
    except ValueError:
        moment = math.nan
    if not math.isfinite(moment):
        raise BadData(f"{path}, line {number}: the time is '{cells[2]}'; it must be a number")
    return moment


def made_up(users: int = 80, items: int = 60) -> Interactions:
    """For tests: the next item is the one after the last, or, in four of ten cases, a popular one."""
    rng = host_rng(0, "made-up interactions")
    popular = 1 / np.arange(1, items + 1) ** 1.5
    lengths = rng.integers(5, 12, users)
    found = []
    for length in lengths:
        last = int(rng.integers(items)) + 1
        for _ in range(length):
            found.append(last)
            jump = rng.random() < 0.4
            last = int(rng.choice(items, p=popular / popular.sum())) + 1 if jump else last % items + 1
    return Interactions(MADE_UP, np.array(found, dtype=np.int64), lengths.astype(np.int64))
