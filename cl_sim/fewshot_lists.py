"""Few-shot task lists: which classes of a set are learned from, and which are kept for the episodes.

Source: CIFAR-FS, Bertinetto et al. 2019, "Meta-learning with Differentiable Closed-Form Solvers"; FC100, Oreshkin et al. 2018,
"TADAM"; mini-ImageNet, Ravi and Larochelle 2017, "Optimization as a Model for Few-Shot Learning"; Omniglot, Lake et al. 2015,
"Human-Level Concept Learning": the background and the evaluation alphabets.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_sim.arrays import load
from cl_sim.errors import BadData, UnknownName

NOVEL = {  # task list: (set, validation classes, test classes); every other class is for training
    "cifar-fs": (
        "cifar100",
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark "
        "television tractor",
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table "
        "telephone wardrobe whale woman worm",
    ),
    "fc100": (
        "cifar100",
        "bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse rabbit shrew snail spider "
        "squirrel tiger wolf worm",
        "baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter porcupine possum raccoon "
        "seal skunk whale woman",
    ),
    "mini-imagenet": (
        "mini-imagenet",
        "n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042 n03535780 "
        "n03584254 n03770439 n03773504 n03980874 n09256479",
        "n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525 n03127925 "
        "n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480",
    ),
    "omniglot": ("omniglot", "", ""),
}


@dataclass(frozen=True)
class Pool:
    """All rows of a set, training and test part alike, and the rows of each group of classes.

    Shapes: x uint8 [N, C, H, W], y [N]; train, val and test are row numbers.
    """

    x: NDArray[Any]
    y: NDArray[np.int64]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]
    digest: str


def pool(name: str, folder: str = "", size: int = 0) -> Pool:
    """The rows of a task list.    Raises: UnknownName; BadData if the set is nowhere or its classes have other names."""
    if name not in NOVEL:
        raise UnknownName("few-shot task list", name, NOVEL, "cl-sim run --help")
    source, *lists = NOVEL[name]
    data = load(source, folder, size=size)
    if data.test is None:
        raise BadData(f"the set '{source}' has no test part, so its classes are not complete")
    x = np.concatenate([data.train.x, data.test.x])
    y = np.concatenate([data.train.y, data.test.y])
    if name == "omniglot":  # the evaluation alphabets are its test part
        rows = np.arange(len(y))
        train, test = rows[: len(data.train.y)], rows[len(data.train.y) :]
        return Pool(x, y, train, rows[:0], test, data.digest)
    val, test = (np.flatnonzero(np.isin(y, numbers(words.split(), data.classes, name))) for words in lists)
    train = np.setdiff1d(np.arange(len(y)), np.concatenate([val, test]))
    return Pool(x, y, train, val, test, data.digest)


def numbers(names: Collection[str], classes: tuple[str, ...], task: str) -> list[int]:
    """The numbers of classes with these names.    Raises: BadData naming one that is missing."""
    missing = sorted(set(names) - set(classes))
    if missing:
        raise BadData(
            f"the task list '{task}' needs a class '{missing[0]}', but the set's classes are called {', '.join(classes[:3])}, ..."
        )
    return [classes.index(name) for name in names]
