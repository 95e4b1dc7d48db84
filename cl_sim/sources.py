"""Where data comes from: Parquet in the Hugging Face image layout, torchvision's loaders, or the user's own files."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_sim.arrays import Arrays, DataSet, Progress, cache_folder, check_labels, user_cache
from cl_sim.errors import BadData, UnknownName

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "omniglot", "tiny-imagenet", "mini-imagenet")
FORMS = ("folder", "parquet", "npz", "csv")
GREY = ("mnist", "fashion-mnist", "omniglot")
LOADERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEST_SHARE = 0.2  # of each class, where a set has no test part of its own
THREADS = 4  # Pillow decodes outside the interpreter's lock


@dataclass(frozen=True)
class Source:
    """A set that was found: a hash of its files, and how to read it."""

    content_hash: Callable[[], str]
    read: Callable[[int, Progress], DataSet]


def find(name: str, folder: str = "", labels: str = "") -> Source:
    """Look for a set.    Raises: UnknownName; BadData if it is nowhere, naming the ways to get it."""
    form, colon, path = name.partition(":")
    if colon and form in FORMS:
        return _own(form, path, labels)
    if name not in NAMES:
        known = [*NAMES, *(f"{form}:PATH" for form in FORMS)]
        raise UnknownName("data set", name, known, "cl-sim list data")
    if name == "digits":
        return Source(lambda: "digits 1", lambda size, progress: _digits(size))
    looked = data_folders(folder)
    for place in looked:
        for spelling in (name, name.replace("-", "_")):
            if sorted((place / spelling).rglob("train*.parquet")):
                return _parquet_set(name, place / spelling, place, labels)
            if (place / spelling / "train").is_dir():
                return _own("folder", str(place / spelling), labels)
    if name in LOADERS or name == "omniglot":
        root = looked[0]
        return Source(
            lambda: f"torchvision {name} {root}", lambda size, progress: _torchvision(name, root, size, labels)
        )
    raise _nowhere(name, looked, "")


def data_folders(folder: str) -> list[Path]:
    """Where named sets are looked for: the folder given, else CL_SIM_DATA, else the user's cache."""
    given = folder or os.environ.get("CL_SIM_DATA", "")
    return [Path(given).expanduser()] if given else [user_cache() / "data"]


def _nowhere(name: str, looked: Sequence[Path], why: str) -> BadData:
    spelling = name.replace("-", "_")
    other = "let torchvision fetch it (needs the network)" if name in LOADERS else "use your own files as folder:PATH"
    return BadData(
        f"the data set '{name}' is not at {looked[0] / spelling}{why}; put Parquet files there ({spelling}/train-*.parquet, "
        f"test-*.parquet), name another folder with --data DIR, or {other}"
    )


# --- named sets -------------------------------------------------------------------------------------------------------


def _digits(size: int) -> DataSet:
    """The 1,797 handwritten digits of scikit-learn, 8x8, values 0 to 16 spread over 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return _split("digits", _resized(x, size), digits.target.astype(np.int64), tuple("0123456789"))


def _torchvision(name: str, root: Path, size: int, labels: str) -> DataSet:
    """Through torchvision's own loader, which may download."""
    from torchvision import datasets

    if labels and ":" not in labels:
        raise BadData(f"stream.labels is '{labels}', but torchvision's {name} has no such column; use FILE:COLUMN")
    try:
        root.mkdir(parents=True, exist_ok=True)
        if name == "omniglot":
            pair = [datasets.Omniglot(str(root), background=part, download=True) for part in (True, False)]
        else:
            loader = getattr(datasets, LOADERS[name])
            pair = [loader(str(root), train=part, download=True) for part in (True, False)]
    except (OSError, RuntimeError) as error:
        raise _nowhere(name, [root], f" and torchvision could not fetch it ({str(error).splitlines()[0]})") from None
    parts = []
    for which, part in zip(("train", "test"), pair, strict=True):
        pictures = [np.asarray(image) for image, _ in part]
        y = np.array([label for _, label in part], dtype=np.int64)
        offset = 964 if name == "omniglot" and which == "test" else 0
        parts.append(Arrays(_resized(_stacked(pictures), size), y + offset))
    classes = tuple(getattr(pair[0], "classes", ())) or _numbered(parts)
    return DataSet(name, _relabelled(parts[0], labels, root), parts[1], classes, "")


def _numbered(parts: Iterable[Arrays]) -> tuple[str, ...]:
    return tuple(str(c) for c in range(1 + max(int(part.y.max()) for part in parts)))


def _parquet_set(name: str, folder: Path, root: Path, labels: str) -> Source:
    """A folder of Parquet files: train-*, and test-* or validation-*, if there is one."""
    train = sorted(folder.rglob("train*.parquet"))
    test = next((found for stem in ("test", "valid", "val") if (found := sorted(folder.rglob(f"{stem}*.parquet")))), [])
    extra = [_label_file(labels, root)[0]] if ":" in labels else []
    mode = "L" if name in GREY else "RGB" if name in NAMES else ""
    column = "" if ":" in labels else labels

    def read(size: int, progress: Progress) -> DataSet:
        first, classes = _read_parquet(train, mode, size, column, progress)
        if not test:
            made = _split(name, first.x, first.y, classes or _numbered([first]))
            return DataSet(name, _relabelled(made.train, labels, root), made.test, made.classes, "")
        second, _ = _read_parquet(test, mode, size, column, progress)
        if name != "omniglot":
            check_labels(first.y, str(train[0].parent))
        classes = classes if len(classes) > max(first.y.max(), second.y.max()) else _numbered([first, second])
        if second.y.max() >= len(classes):
            raise BadData(
                f"{test[0]}: label {second.y.max()} is not among the {len(classes)} classes of the training part"
            )
        return DataSet(name, _relabelled(first, labels, root), second, classes, "")

    return Source(lambda: _hash_of([*train, *test, *extra]) + mode + labels, read)


def _read_parquet(
    paths: Sequence[Path], mode: str, size: int, column: str, progress: Progress
) -> tuple[Arrays, tuple[str, ...]]:
    """Decode the images of some Parquet files, in order; class names from the schema where it has them."""
    import pyarrow.parquet as parquet

    encoded: list[bytes] = []
    y: list[NDArray[np.int64]] = []
    where: list[str] = []
    names: tuple[str, ...] = ()
    for path in paths:
        table = _opened(path, parquet.read_table)
        image = next((c for c in ("image", "img") if c in table.column_names), None)
        label = column or _label_column(table, path)
        for wanted in (image or "image", label):
            if wanted not in table.column_names:
                raise BadData(f"{path} has no column '{wanted}'; it has {', '.join(table.column_names)}")
        encoded += [_image_bytes(cell, path, row) for row, cell in enumerate(table.column(image).to_pylist())]
        values = table.column(label).to_numpy()
        if not np.issubdtype(values.dtype, np.integer):
            raise BadData(f"{path}: column '{label}' must hold whole numbers, it holds {values.dtype}")
        y.append(values.astype(np.int64))
        where += [f"{path}, row {row}" for row in range(len(values))]
        names = names or _class_names(table.schema.metadata or {}, label)
    x = decode(encoded, where, mode, size, progress)
    return Arrays(x, np.concatenate(y)), names


def _opened(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except Exception as error:  # pyarrow raises its own kinds; each means that the file cannot be read
        raise BadData(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _image_bytes(cell: Any, path: Path, row: int) -> bytes:
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        content: bytes = cell["bytes"]
        return content
    raise BadData(f"{path}, row {row}: the image cell must be a struct with the encoded file in 'bytes'")


def _label_column(table: Any, path: Path) -> str:
    whole = [f.name for f in table.schema if str(f.type).startswith(("int", "uint"))]
    for usual in ("label", "fine_label"):
        if usual in whole:
            return usual
    if len(whole) == 1:
        return str(whole[0])
    raise BadData(
        f"{path} has no column 'label', and its whole-number columns are {whole}; say --set stream.labels=COLUMN"
    )


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Names from the feature description of the `datasets` library, if the schema carries one."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


# --- the user's own data ----------------------------------------------------------------------------------------------


def _own(form: str, text: str, labels: str) -> Source:
    path_text, _, option = text.partition("#")
    path = Path(path_text).expanduser()
    if not path.exists():
        raise BadData(f"{form}:{path_text}: there is no such file or folder; paths count from {Path.cwd()}")
    name = f"{form}:{path.name}"
    if form == "parquet":
        if path.is_dir():
            if not sorted(path.rglob("train*.parquet")):
                raise BadData(f"{path} holds no train-*.parquet; name the files train-*.parquet and test-*.parquet")
            return _parquet_set(name, path, path, labels)

        def read_one(size: int, progress: Progress) -> DataSet:
            column = "" if ":" in labels else labels
            arrays, names = _read_parquet([path], "", size, column, progress)
            return _split(name, arrays.x, arrays.y, names or _numbered([arrays]))

        return Source(lambda: _hash_of([path]) + labels, read_one)
    if labels:
        raise BadData(f"stream.labels works for Parquet data, not for {form}:PATH")
    if form == "folder":
        return Source(
            lambda: _hash_of(_image_files(path)), lambda size, progress: _read_folder(path, name, size, progress)
        )
    if form == "npz":
        return Source(lambda: _hash_of([path]), lambda size, progress: _read_npz(path, name, size))
    return Source(lambda: _hash_of([path]) + option, lambda size, progress: _read_csv(path, name, option))


def _image_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGES]


def _read_folder(folder: Path, name: str, size: int, progress: Progress) -> DataSet:
    """train/<class>/* and test/<class>/*, or <class>/* alone."""
    train = folder / "train" if (folder / "train").is_dir() else folder
    test = next((folder / part for part in ("test", "val", "validation") if (folder / part).is_dir()), None)
    names = tuple(path.name for path in sorted(train.iterdir()) if path.is_dir() and path != test)
    if not names:
        raise BadData(f"{train} has no class folders; put images in {train}/<class>/*.png or *.jpg")
    first = _read_classes(train, names, size, progress)
    if test is None or train == folder:
        return _split(name, first.x, first.y, names)
    strange = {path.name for path in test.iterdir() if path.is_dir()} - set(names)
    if strange:
        raise BadData(f"{test} has the class '{min(strange)}', which {train} has not")
    return DataSet(name, first, _read_classes(test, names, size, progress), names, "")


def _read_classes(folder: Path, names: Sequence[str], size: int, progress: Progress) -> Arrays:
    files, y = [], []
    for label, name in enumerate(names):
        inside = _image_files(folder / name)
        if not inside:
            raise BadData(f"{folder / name} holds no image; allowed are {', '.join(IMAGES)}")
        files += inside
        y += [label] * len(inside)
    x = decode([file.read_bytes() for file in files], [str(file) for file in files], "", size, progress)
    return Arrays(x, np.array(y, dtype=np.int64))


def _read_npz(path: Path, name: str, size: int) -> DataSet:
    """Arrays x and y, or x_train, y_train, x_test, y_test."""
    content = _opened(path, _npz_arrays)
    keys = set(content)
    if {"x_train", "y_train", "x_test", "y_test"} <= keys:
        parts = [_npz_part(content, f"x_{part}", f"y_{part}", path, size) for part in ("train", "test")]
        check_labels(parts[0].y, f"{path}, y_train")
        if parts[1].y.max() > parts[0].y.max():
            raise BadData(f"{path}, y_test: label {parts[1].y.max()} does not occur in y_train")
        return DataSet(name, parts[0], parts[1], _numbered(parts), "")
    if {"x", "y"} <= keys:
        part = _npz_part(content, "x", "y", path, size)
        return _split(name, part.x, part.y, _numbered([part]))
    raise BadData(f"{path} has the arrays {sorted(keys)}; it needs x and y, or x_train, y_train, x_test and y_test")


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as content:
        return dict(content)


def _npz_part(content: Any, x_key: str, y_key: str, path: Path, size: int) -> Arrays:
    x, y = content[x_key], content[y_key]
    if len(x) != len(y):
        raise BadData(f"{path}: {x_key} has {len(x)} rows and {y_key} has {len(y)}")
    if not np.issubdtype(y.dtype, np.integer):
        raise BadData(f"{path}: {y_key} must hold whole numbers, it holds {y.dtype}")
    if x.ndim == 2:
        return Arrays(finite_table(x, f"{path}, {x_key}"), y.astype(np.int64))
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise BadData(
            f"{path}: {x_key} is {x.dtype} {list(x.shape)}; images are uint8 [N, H, W] or [N, H, W, C], tables [N, F]"
        )
    if x.ndim == 4 and x.shape[-1] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    return Arrays(_resized(x if x.ndim == 4 else x[:, None], size), y.astype(np.int64))


def _read_csv(path: Path, name: str, option: str) -> DataSet:
    """Numeric columns in file order; the label is the last column, or `#label=NAME`. There is no test part."""
    from pyarrow import csv

    table = _opened(path, lambda p: csv.read_csv(p))
    if not option and not _has_header(table.column_names):
        table = _opened(path, lambda p: csv.read_csv(p, read_options=csv.ReadOptions(autogenerate_column_names=True)))
    label = option.removeprefix("label=") if option else table.column_names[-1]
    if label not in table.column_names:
        raise BadData(f"{path} has no column '{label}'; it has {', '.join(table.column_names)}")
    columns = [column for column in table.column_names if column != label]
    for column in columns:
        _check_numeric(table.column(column), column, path)
    x = np.stack([table.column(column).to_numpy().astype(np.float64) for column in columns], 1)
    values = table.column(label).to_numpy()
    names, y = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
    return DataSet(
        name, Arrays(finite_table(x, str(path), first_row=2), y.astype(np.int64)), None, tuple(map(str, names)), ""
    )


def _has_header(names: Sequence[str]) -> bool:
    """A first line whose columns are all numbers, but for the last one, is data."""
    return not all(_is_number(name) for name in names[:-1])


def _check_numeric(column: Any, name: str, path: Path) -> None:
    if not str(column.type).startswith(("int", "uint", "float", "double", "bool")):
        first = next(row for row, value in enumerate(column.to_pylist()) if not _is_number(value))
        value = column[first].as_py()
        raise BadData(
            f"{path}, line {first + 2}: column '{name}' holds {value!r}; every column but the label must be a number"
        )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def finite_table(x: NDArray[Any], where: str, first_row: int = 0) -> NDArray[np.float32]:
    """A table as float32.    Raises: BadData naming the first row that is not finite."""
    table = x.astype(np.float32)
    bad = ~np.isfinite(table)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise BadData(
            f"{where}, row {row + first_row}, column {column + 1}: {table[row, column]} is not a finite number"
        )
    return table


# --- shared steps -----------------------------------------------------------------------------------------------------


def decode(
    encoded: Sequence[bytes], where: Sequence[str], mode: str, size: int, progress: Progress
) -> NDArray[np.uint8]:
    """Encoded images as uint8 [N, C, H, W], decoded by several threads.

    `mode` is L or RGB; empty: RGB unless every image is grey.

    Raises: BadData naming the image that is broken, or the first two that differ in size.
    """
    from PIL import Image

    def one(number: int) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(encoded[number])) as image:
                grey = image.mode in ("1", "L", "LA", "I;16")
                picture = image.convert(mode or ("L" if grey else "RGB"))
        except Exception as error:  # Pillow raises many kinds; each means that the image is broken
            raise BadData(f"{where[number]}: this image cannot be decoded ({str(error).splitlines()[0]})") from error
        if size:
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture)

    pictures: list[NDArray[np.uint8]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for number, picture in enumerate(pool.map(one, range(len(encoded)))):
            pictures.append(picture)
            if picture.shape[:2] != pictures[0].shape[:2]:
                raise BadData(
                    f"{where[number]} has {picture.shape[1]}x{picture.shape[0]} pixels, but {where[0]} has "
                    f"{pictures[0].shape[1]}x{pictures[0].shape[0]}; make them equal with --set stream.size=32"
                )
            if number % 1000 == 999:
                progress(number + 1, len(encoded))
    return _stacked(pictures)


def _stacked(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """[N, H, W] grey or [N, H, W, 3] pictures as [N, C, H, W]; grey ones among coloured ones are repeated."""
    if all(picture.ndim == 2 for picture in pictures):
        return np.stack(pictures)[:, None]
    coloured = [picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2) for picture in pictures]
    return np.ascontiguousarray(np.stack(coloured).transpose(0, 3, 1, 2))


def _resized(x: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if not size or x.shape[-2:] == (size, size):
        return x
    from PIL import Image

    def one(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        plane = Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0))
        return np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR))

    return _stacked([one(picture) for picture in x])


def _split(name: str, x: NDArray[Any], y: NDArray[np.int64], classes: tuple[str, ...]) -> DataSet:
    """A seeded stratified split: the last fifth of each class's shuffled rows is the test part, file order kept.

    Mini-ImageNet has 600 images a class, of which 100 are for testing.
    """
    check_labels(y, name)
    rng = np.random.default_rng(0)
    test = np.zeros(len(y), dtype=bool)
    for c in range(int(y.max()) + 1):
        rows = rng.permutation(np.flatnonzero(y == c))
        if len(rows) < 2:
            raise BadData(f"{name}: class {c} has {len(rows)} sample; a split into training and test needs at least 2")
        count = 100 if name == "mini-imagenet" else max(1, round(TEST_SHARE * len(rows)))
        test[rows[:count]] = True
    return DataSet(name, Arrays(x[~test], y[~test]), Arrays(x[test], y[test]), classes, "")


def _label_file(labels: str, root: Path) -> tuple[Path, str]:
    text, _, column = labels.rpartition(":")
    for path in (Path(text).expanduser(), root / text):
        if path.is_file():
            return path, column
    raise BadData(f"stream.labels names {text}, which is neither here nor in {root}; write FILE:COLUMN")


def _relabelled(train: Arrays, labels: str, root: Path) -> Arrays:
    """The training part with the labels of another file, if one is named."""
    if ":" not in labels:
        return train
    path, column = _label_file(labels, root)
    if path.suffix == ".parquet":
        import pyarrow.parquet as reader

        table = _opened(path, reader.read_table)
    else:
        from pyarrow import csv

        table = _opened(path, lambda p: csv.read_csv(p))
    if column not in table.column_names:
        raise BadData(f"{path} has no column '{column}'; it has {', '.join(table.column_names)}")
    y = table.column(column).to_numpy()
    if len(y) != len(train.y):
        raise BadData(f"{path} has {len(y)} labels, but the training part has {len(train.y)} samples")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > train.y.max():
        raise BadData(f"{path}: column '{column}' must hold class numbers 0 to {train.y.max()}")
    return Arrays(train.x, y.astype(np.int64))


def _hash_of(paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents; a file is read again only if its size or time has changed."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    index = cache / "hashes.json"
    known = _read_index(index)
    found = hashlib.sha256()
    fresh = {}
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        fresh[key] = known.get(key) or hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{path.name if len(paths) < 50 else path.parent.name + '/' + path.name} {fresh[key]}".encode())
    if len(paths) < 50 and not fresh.items() <= known.items():
        draft = index.with_name(f"hashes.{os.getpid()}.tmp")
        draft.write_text(json.dumps({**known, **fresh}), encoding="utf-8")
        draft.replace(index)
    return found.hexdigest()


def _read_index(index: Path) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known
