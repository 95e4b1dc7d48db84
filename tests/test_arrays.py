"""Data sets: found, decoded once, cached whole or not at all, and refused with file and row when they are bad."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cl_sim import arrays
from cl_sim.arrays import Resident, load
from cl_sim.errors import BadData, UnknownName


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CL_SIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CL_SIM_DATA", raising=False)
    return tmp_path / "cache"


def picture(value: int, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> Image.Image:
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray((np.arange(np.prod(shape)).reshape(shape) + value).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, labels: list[int], names: list[str] | None = None, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(picture(number)), "path": f"{number}.png"} for number in range(len(labels))]
    table = pa.table({"image": cells, "label": labels, **columns})
    if names:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)


def image_folder(folder: Path, classes: dict[str, int], part: str = "train") -> None:
    for label, (name, count) in enumerate(classes.items()):
        (folder / part / name).mkdir(parents=True)
        for number in range(count):
            picture(10 * label + number).save(folder / part / name / f"{number:02}.png")


def test_digits_need_no_download_and_are_split_by_class() -> None:
    data = load("digits")
    assert data.train.x.shape[1:] == (1, 8, 8)
    assert len(data.train.y) + len(data.test.y) == 1797
    assert (data.train.x.min(), data.train.x.max()) == (0, 255)
    counts = np.bincount(data.train.y), np.bincount(data.test.y)
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 0.2, atol=0.005)


def test_parquet_keeps_pixels_order_labels_and_class_names(tmp_path: Path) -> None:
    parquet(tmp_path / "cifar10" / "train-00000-of-00002.parquet", [0, 1, 0], ["cat", "dog"])
    parquet(tmp_path / "cifar10" / "train-00001-of-00002.parquet", [1], ["cat", "dog"])
    parquet(tmp_path / "cifar10" / "test-00000-of-00001.parquet", [1, 0], ["cat", "dog"])
    data = load("cifar10", str(tmp_path))
    assert data.train.y.tolist() == [0, 1, 0, 1]
    assert data.classes == ("cat", "dog")
    for row, number in enumerate([0, 1, 2, 0]):
        np.testing.assert_array_equal(data.train.x[row], np.asarray(picture(number)).transpose(2, 0, 1))


@pytest.mark.parametrize("place", ["fashion_mnist", "fashion-mnist", "fashion_mnist/data"])
def test_a_folder_may_be_spelt_either_way_and_grey_sets_stay_grey(tmp_path: Path, place: str) -> None:
    for part in ("train", "test"):
        parquet(tmp_path / place / f"{part}-0.parquet", [0, 1])
    assert load("fashion-mnist", str(tmp_path)).train.x.shape == (2, 1, 5, 4)


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "validation"):
        parquet(tmp_path / "tiny_imagenet" / f"{part}-0.parquet", [0, 1])
    monkeypatch.setenv("CL_SIM_DATA", str(tmp_path))
    assert len(load("tiny-imagenet").test.y) == 2


def test_a_missing_set_names_both_ways_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadData) as caught:
        load("tiny-imagenet", str(tmp_path / "nowhere"))
    for words in ("tiny_imagenet/train-*.parquet", "--data DIR", "folder:PATH"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_set_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'cifar10'"):
        load("cifar11")


def test_a_folder_of_images_is_read_with_its_own_test_part(tmp_path: Path) -> None:
    image_folder(tmp_path, {"ape": 3, "bee": 2})
    image_folder(tmp_path, {"ape": 1, "bee": 1}, "test")
    data = load(f"folder:{tmp_path}")
    assert data.classes == ("ape", "bee")
    assert data.train.y.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(data.train.x[3], np.asarray(picture(10)).transpose(2, 0, 1))
    assert data.test.y.tolist() == [0, 1]


def test_a_folder_without_a_test_part_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {"ape": 10, "bee": 10}, "")
    one = load(f"folder:{tmp_path / 'set'}")
    assert np.bincount(one.test.y).tolist() == [2, 2]
    assert load(f"folder:{tmp_path / 'set'}").digest == one.digest


@pytest.mark.parametrize(
    ("shape", "expected"), [((6, 4, 4), (1, 4, 4)), ((6, 4, 4, 3), (3, 4, 4)), ((6, 3, 4, 4), (3, 4, 4))]
)
def test_npz_images_may_have_channels_first_last_or_none(tmp_path: Path, shape: Any, expected: Any) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    y = np.array([0, 0, 0, 1, 1, 1])
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = load(f"npz:{tmp_path / 'd.npz'}")
    assert data.train.x.shape[1:] == expected
    flat = x[2].transpose(2, 0, 1) if shape == (6, 4, 4, 3) else x[2]
    np.testing.assert_array_equal(data.train.x[2].reshape(flat.shape), flat)


@pytest.mark.parametrize("header", [True, False])
def test_a_table_keeps_file_order_and_has_its_label_last_or_by_name(tmp_path: Path, header: bool) -> None:
    lines = ["1.5,2,up", "0.5,7,down", "-1,3,up"]
    text = "\n".join([*(["a,b,class"] if header else []), *lines]) + "\n"
    (tmp_path / "t.csv").write_text(text)
    data = load(f"csv:{tmp_path / 't.csv'}")
    assert data.train.x.tolist() == [[1.5, 2], [0.5, 7], [-1, 3]]
    assert data.classes == ("down", "up")
    assert data.train.y.tolist() == [1, 0, 1]
    assert data.test is None
    if header:
        (tmp_path / "u.csv").write_text("class,a\n1,5\n0,6\n")
        assert load(f"csv:{tmp_path / 'u.csv'}#label=class").train.x.tolist() == [[5], [6]]


def test_labels_of_another_file_replace_the_training_labels_only(tmp_path: Path) -> None:
    for part in ("train", "test"):
        parquet(tmp_path / "cifar10" / f"{part}-0.parquet", [0, 1, 2], coarse_label=[1, 0, 0])
    pq.write_table(pa.table({"worse": [2, 2, 0]}), tmp_path / "human.parquet")
    data = load("cifar10", str(tmp_path), labels="human.parquet:worse")
    assert (data.train.y.tolist(), data.test.y.tolist()) == ([2, 2, 0], [0, 1, 2])
    coarse = load("cifar10", str(tmp_path), labels="coarse_label")
    assert (coarse.train.y.tolist(), coarse.test.y.tolist()) == ([1, 0, 0], [1, 0, 0])
    with pytest.raises(BadData, match="no column 'none'"):
        load("cifar10", str(tmp_path), labels="human.parquet:none")


def test_images_of_mixed_sizes_are_named_and_can_be_resized(tmp_path: Path) -> None:
    image_folder(tmp_path, {"ape": 2, "bee": 2})
    picture(0, (7, 6)).save(tmp_path / "train" / "bee" / "big.png")
    with pytest.raises(BadData, match=r"big.png has 6x7 pixels, but .*00.png has 4x5.*--set stream.size=32"):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}", size=8).train.x.shape[1:] == (3, 8, 8)


def break_image(folder: Path) -> str:
    image_folder(folder, {"ape": 2, "bee": 2})
    (folder / "train" / "bee" / "01.png").write_bytes(b"not an image")
    return f"folder:{folder}"


def empty_class(folder: Path) -> str:
    image_folder(folder, {"ape": 2, "bee": 0})
    return f"folder:{folder}"


def gap_in_labels(folder: Path) -> str:
    parquet(folder / "train-0.parquet", [0, 2, 2])
    parquet(folder / "test-0.parquet", [0])
    return f"parquet:{folder}"


def negative_label(folder: Path) -> str:
    np.savez(folder / "d.npz", x=np.zeros((4, 3, 3), np.uint8), y=np.array([0, 0, -1, 0]))
    return f"npz:{folder / 'd.npz'}"


def lengths_differ(folder: Path) -> str:
    np.savez(folder / "d.npz", x=np.zeros((4, 3, 3), np.uint8), y=np.array([0, 0]))
    return f"npz:{folder / 'd.npz'}"


def nan_in_table(folder: Path) -> str:
    (folder / "t.csv").write_text("a,b,y\n1,2,0\n3,nan,1\n")
    return f"csv:{folder / 't.csv'}"


def text_in_table(folder: Path) -> str:
    (folder / "t.csv").write_text("a,b,y\n1,2,0\n3,oops,1\n")
    return f"csv:{folder / 't.csv'}"


def broken_cell(folder: Path) -> str:
    cells = [{"bytes": png(picture(0)), "path": "a"}, {"bytes": b"broken", "path": "b"}]
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), folder / "one.parquet")
    return f"parquet:{folder / 'one.parquet'}"


def no_label(folder: Path) -> str:
    pq.write_table(pa.table({"image": [{"bytes": png(picture(0)), "path": "a"}]}), folder / "one.parquet")
    return f"parquet:{folder / 'one.parquet'}"


def no_such_path(folder: Path) -> str:
    return f"folder:{folder / 'nowhere'}"


BAD = [
    (break_image, ["bee", "01.png", "cannot be decoded"]),
    (empty_class, ["bee", "holds no image"]),
    (gap_in_labels, ["class 1 has no sample"]),
    (negative_label, ["row 2", "-1 is negative"]),
    (lengths_differ, ["4 rows", "2"]),
    (nan_in_table, ["t.csv", "row 3", "column 2"]),
    (text_in_table, ["t.csv", "line 3", "'b'", "'oops'"]),
    (broken_cell, ["one.parquet, row 1", "cannot be decoded"]),
    (no_label, ["one.parquet", "no column 'label'"]),
    (no_such_path, ["no such file or folder"]),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_data_is_named_with_its_place_and_nothing_is_cached(make: Any, words: list[str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    name = make(source)
    with pytest.raises(BadData) as caught:
        load(name)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".npy", ".tmp")]
    assert not left


def test_a_set_is_decoded_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_sim import sources

    image_folder(tmp_path / "set", {"ape": 3, "bee": 3})
    calls = []
    decode = sources.decode
    monkeypatch.setattr(sources, "decode", lambda *args: calls.append(1) or decode(*args))
    one, two = load(f"folder:{tmp_path / 'set'}"), load(f"folder:{tmp_path / 'set'}")
    assert len(calls) == 1
    assert one.digest == two.digest
    path = tmp_path / "set" / "train" / "ape" / "00.png"
    picture(77).save(path)
    os.utime(path, ns=(1, 1))
    assert load(f"folder:{tmp_path / 'set'}").digest != one.digest


def test_a_damaged_cache_is_rebuilt(own_cache: Path) -> None:
    whole = load("digits")
    expected = np.array(whole.train.x)
    (path,) = own_cache.rglob("train-x.npy")
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(load("digits").train.x, expected)


def test_a_crash_while_writing_leaves_nothing_half_done(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(arrays.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            load("digits")
    assert not list(own_cache.rglob("*.npy"))
    assert len(load("digits").train.y) == 1438


def digest_in_a_process(cache: str) -> str:
    os.environ["CL_SIM_CACHE"] = cache
    return load("digits").digest


def test_two_processes_at_once_get_the_same_arrays(own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        digests = pool.map(digest_in_a_process, [str(own_cache)] * 2)
    assert len(set(digests)) == 1
    assert len(list(own_cache.rglob("train-x.npy"))) == 1


def test_rows_are_gathered_as_indexing_does() -> None:
    x = np.arange(60, dtype=np.uint8).reshape(10, 1, 2, 3)
    rows = Resident(x, torch.device("cpu"))
    index = torch.tensor([[3, 3, 9], [0, 1, 2]])
    assert torch.equal(rows.gather(index), torch.tensor(x)[index])
    assert rows.on_device


@pytest.mark.parametrize(
    ("name", "train", "test", "mean"),
    [
        ("mnist", 60_000, 10_000, (0.1307,)),
        ("cifar100", 50_000, 10_000, (0.5071, 0.4865, 0.4409)),
        ("fashion-mnist", 20_000, 10_000, (0.2858,)),
    ],
)
@pytest.mark.slow
def test_real_sets_have_the_published_counts_and_means(
    name: str, train: int, test: int, mean: tuple[float, ...]
) -> None:
    folder = os.environ.get("REAL_DATA", "")
    if not folder:
        pytest.skip("REAL_DATA names no folder with real sets")
    data = load(name, folder)
    assert (len(data.train.y), len(data.test.y)) == (train, test)
    np.testing.assert_allclose((data.train.x / 255).mean((0, 2, 3)), mean, atol=5e-5)
