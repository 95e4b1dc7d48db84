"""Training views: each image its own draw, from the counter RNG, checked pixel by pixel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from cl_sim import augment
from cl_sim.constants import constant
from cl_sim.errors import BadConfig, UnknownName
from cl_sim.rng import Rng, uniform_of
from cl_sim.testing import NoHostReads
from cl_sim.types import Field

FIELDS = {"x": Field((3, 6, 5), torch.uint8), "y": Field((), torch.int64)}


def pictures(runs: int, batch: int, channels: int = 3, height: int = 6, width: int = 5) -> Tensor:
    shape = (runs, batch, channels, height, width)
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_shift_equals_cropping_each_padded_image() -> None:
    x = pictures(2, 7)
    shifted, corner = augment.shift(x, Rng([0, 1], "t"), 2), Rng([0, 1], "t").below(5, 7, 2)
    for run in range(2):
        for item in range(7):
            padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
            padded[:, 2:8, 2:7] = x[run, item]
            top, left = corner[run, item].tolist()
            assert torch.equal(shifted[run, item], padded[:, top : top + 6, left : left + 5])


@pytest.mark.parametrize("pixels", [0, 2, 4])
def test_a_mirrored_shift_equals_cropping_each_image_padded_by_reflection(pixels: int) -> None:
    x = pictures(2, 7)
    shifted = augment.shift_mirrored(x, Rng([0, 1], "t"), pixels)
    corner = Rng([0, 1], "t").below(2 * pixels + 1, 7, 2)
    for run in range(2):
        for item in range(7):
            padded = np.pad(x[run, item].numpy(), ((0, 0), (pixels,) * 2, (pixels,) * 2), mode="reflect")
            top, left = corner[run, item].tolist()
            assert np.array_equal(shifted[run, item].numpy(), padded[:, top : top + 6, left : left + 5])
    with pytest.raises(BadConfig, match="from 0 to 4"):  # a reflection is one pixel shorter than the image
        augment.pipeline(["shift_mirrored:5"], Rng([0], "t"), FIELDS)


def test_flip_mirrors_the_drawn_images_and_half_of_all() -> None:
    x = pictures(4, 1000)
    flipped = augment.flip(x, Rng(range(4), "t"))
    mirrored = (flipped == x.flip(-1)).flatten(2).all(-1)
    same = (flipped == x).flatten(2).all(-1)
    assert (mirrored ^ same).all()
    assert abs(float(mirrored.double().mean()) - 0.5) < 4.5 * math.sqrt(0.25 / 4000)  # false alarm: 7 in a million


def test_vflip_turns_the_drawn_images_upside_down() -> None:
    x, rng = pictures(2, 9), Rng([0, 1], "t")
    turned, drawn = augment.vflip(x, rng, 0.3), Rng([0, 1], "t").chance(0.3, 9)
    assert 0 < int(drawn.sum()) < 18
    assert torch.equal(turned, one_by_one(lambda image, r, b: image.flip(1) if drawn[r, b] else image, x))


def blurred(sigma: Tensor) -> augment.Blur:
    return augment.Blur(torch.ones_like(sigma, dtype=torch.bool), sigma)


def test_blur_is_a_weighted_mean_of_the_pixels_around() -> None:
    x = pictures(1, 3).double() / 255
    sigma = torch.tensor([[0.4, 1.0, 2.0]], dtype=torch.float64)
    found = augment.apply_blur(x, blurred(sigma))
    for item in range(3):
        for row, column in ((0, 0), (2, 4), (5, 1)):
            weights = {
                (i, j): math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * float(sigma[0, item]) ** 2))
                for i in range(6)
                for j in range(5)
            }
            mean = sum(w * float(x[0, item, 1, i, j]) for (i, j), w in weights.items()) / sum(weights.values())
            assert float(found[0, item, 1, row, column]) == pytest.approx(mean, abs=1e-9)
    flat = torch.full((1, 2, 3, 6, 5), 0.7)
    assert_close(augment.apply_blur(flat, blurred(torch.tensor([[0.1, 2.0]]))), flat)
    bytes_, drawn = pictures(2, 40), Rng([0, 1], "t").chance(0.5, 40)
    changed = (augment.blur(bytes_, Rng([0, 1], "t"), sigma=(1.0, 2.0)) != bytes_).flatten(2).any(-1)
    assert torch.equal(changed, drawn)


def test_blur_equals_torchvisions_away_from_the_border() -> None:
    from torchvision.transforms import functional

    x = torch.rand(1, 2, 3, 33, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([[0.5, 1.5]], dtype=torch.float64)
    theirs = one_by_one(lambda image, r, b: functional.gaussian_blur(image, [25, 25], [float(sigma[r, b])]), x)
    assert_close(
        augment.apply_blur(x, blurred(sigma))[..., 12:-12, 12:-12], theirs[..., 12:-12, 12:-12], rtol=0, atol=1e-9
    )


def test_erase_blackens_one_square_and_nothing_else() -> None:
    x = pictures(2, 9)
    erased, rng = augment.erase(x, Rng([0, 1], "t"), 4), Rng([0, 1], "t")
    top, left = rng.below(6, 9, 1)[..., 0] - 2, rng.below(5, 9, 1)[..., 0] - 2
    for run in range(2):
        for item in range(9):
            for row in range(6):
                for column in range(5):
                    inside = 0 <= row - int(top[run, item]) < 4 and 0 <= column - int(left[run, item]) < 4
                    expected = torch.zeros(3, dtype=torch.uint8) if inside else x[run, item, :, row, column]
                    assert torch.equal(erased[run, item, :, row, column], expected)


@pytest.mark.parametrize(
    "names",
    [
        ("shift", "flip"),
        ("shift_mirrored",),
        ("erase:3", "flip:0.2"),
        ("resized_crop", "jitter", "grey"),
        ("vflip", "blur"),
        ("replay",),
        (),
    ],
)
def test_a_run_sees_the_same_views_alone_and_stacked_without_host_reads(names: tuple[str, ...]) -> None:
    x = pictures(3, 8)
    stacked = augment.pipeline(names, Rng([4, 5, 6], "t"), FIELDS)
    alone = augment.pipeline(names, Rng([5], "t"), FIELDS)({"x": x[1:2]})["x"]  # which makes the constants
    with NoHostReads():
        together = stacked({"x": x, "y": torch.zeros(3, 8)})
    assert torch.equal(together["x"][1], alone[0])
    assert together["x"].dtype == torch.uint8
    assert set(together) == {"x", "y"}


def test_views_may_be_kept_for_a_backward_pass() -> None:
    floats = {"x": torch.rand(1, 4, 3, 6, 5)}
    views = augment.pipeline(("flip",), Rng([0], "t"), {"x": Field((3, 6, 5), torch.float32)})
    weight = torch.ones(5, requires_grad=True)
    seen = views(floats)["x"]
    (seen * weight).sum().backward()  # keeps what was seen
    assert weight.grad is not None
    assert_close(weight.grad, seen.sum((0, 1, 2, 3)))


def test_no_augmentation_hands_the_batch_through() -> None:
    batch, views = {"x": pictures(1, 2)}, augment.pipeline((), Rng([0], "t"), FIELDS)
    assert views(batch) is batch
    assert views.both(batch, views.draw(batch), batch) == (batch, batch)


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["bytes", "floats"])
def test_drawing_and_applying_is_the_whole_view(name: str, dtype: torch.dtype) -> None:
    kind, rngs, x = augment.AUGMENTATIONS[name], [Rng([0, 1], "t") for _ in range(2)], pictures(2, 30)
    x = x if dtype == torch.uint8 else augment.to_float(x)
    settings = {"pixels": 2} if name in (*augment.MOVES, "erase") else {}
    whole = kind.views(x, rng=rngs[0], **settings)
    assert torch.equal(whole, kind.apply(x, kind.draw(rngs[1], x, **settings), **settings))
    assert torch.equal(rngs[0].counter, rngs[1].counter)
    assert not torch.equal(whole, x)


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_a_name_without_a_number_is_the_view_as_it_is_described(name: str) -> None:
    x, moves = pictures(1, 30), {"pixels": 1} if name in augment.MOVES else {}  # an eighth of 5 pixels
    rngs = [Rng([0], "t") for _ in range(2)]
    whole = augment.AUGMENTATIONS[name].views(x, rng=rngs[0], **moves)
    assert torch.equal(augment.pipeline((name,), rngs[1], FIELDS)({"x": x})["x"], whole)


@pytest.mark.parametrize("second", [0, 1, 6])
@pytest.mark.parametrize(
    "names",
    [
        ("shift", "flip"),
        ("shift_mirrored", "vflip"),
        ("erase:3", "crop:1"),
        ("resized_crop", "jitter", "grey"),
        ("blur",),
        ("replay",),
        ("strong",),
    ],
)
def test_both_views_at_once_are_the_views_made_in_turn(names: tuple[str, ...], second: int) -> None:
    x, rngs = pictures(2, 4 + second), [Rng([0, 1], "t") for _ in range(2)]
    new, old = {"x": x[:, :4], "y": torch.zeros(2, 4)}, {"x": x[:, 4:], "slot": torch.ones(2, second)}
    at_once, in_turn = (augment.pipeline(names, rng, FIELDS) for rng in rngs)
    drawn, between = at_once.draw(new), rngs[0].bits(3)
    together = at_once.both(new, drawn, old)
    one = in_turn(new)
    assert torch.equal(between, rngs[1].bits(3))
    other = in_turn(old) if second else old
    assert torch.equal(rngs[0].counter, rngs[1].counter)
    for made, expected in zip(together, (one, other), strict=True):
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_the_words_of_replay_views_are_those_of_their_parts() -> None:
    one, two = Rng([0, 1], "t"), Rng([0, 1], "t")
    words = augment.draw_replay(one, 9)
    sizes, place, mirror, colours, order, grey = torch.split(words, augment.REPLAY_WORDS, -1)
    boxes = augment.boxes_of(uniform_of(sizes).view(2, 9, augment.TRIES, 2), place, 24, 32)
    assert torch.equal(boxes, augment.draw_boxes(two, 9, 24, 32))
    assert torch.equal(uniform_of(mirror)[..., 0], two.uniform(9))
    jitter = augment.jitter_of(uniform_of(colours), order)
    assert all(torch.equal(*parts) for parts in zip(jitter, augment.draw_jitter(two, 9), strict=True))
    assert torch.equal(uniform_of(grey)[..., 0], two.uniform(9))
    assert torch.equal(one.counter, two.counter)


def test_a_constant_is_made_once_and_may_meet_gradients() -> None:
    with torch.inference_mode():
        made = constant((1.5, -2.0), torch.device("cpu"))
    assert constant((1.5, -2.0), torch.device("cpu")) is made
    assert constant((1.5, -2.0), torch.device("cpu"), torch.float64).dtype == torch.float64
    leaf = torch.ones(2, requires_grad=True)
    (leaf * made).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [1.5, -2.0]


def test_wrong_words_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(UnknownName, match="did you mean 'flip'"):
        augment.pipeline(("flop",), Rng([0], "t"), FIELDS)
    with pytest.raises(BadConfig, match="a number from 0 to 1"):
        augment.pipeline(("flip:often",), Rng([0], "t"), FIELDS)
    with pytest.raises(BadConfig, match="needs images"):
        augment.pipeline(("flip",), Rng([0], "t"), {"x": Field((9,), torch.float32)})


# Parity with torchvision, on the same draws. Bytes are compared in units of 1/255.


def one_by_one(change: Callable[[Tensor, int, int], Tensor], x: Tensor) -> Tensor:
    """The images changed one after the other: the slow twin of a batched augmentation.    Shapes: [R, B, ...] -> same."""
    runs, batch = x.shape[:2]
    return torch.stack([torch.stack([change(x[r, b], r, b) for b in range(batch)]) for r in range(runs)])


def difficult_pictures(runs: int, batch: int) -> Tensor:
    """Noise with columns of grey, of pure colours, of two equal channels, and of greys with one byte of colour."""
    x = pictures(runs, batch, height=9, width=8)
    x[..., 0] = x[:, :, :1, :, 0]
    x[..., 1] = (x[..., 1] > 127) * 255
    for column, (one, two) in enumerate([(0, 1), (1, 2), (0, 2)], start=2):
        x[:, :, one, :, column] = x[:, :, two, :, column]
    x[..., 5] = x[:, :, :1, :, 5]
    x[:, :, 1, :, 5] -= 1
    return x


def adjust(image: Tensor, kind: int, factor: float) -> Tensor:
    """One of torchvision's four colour changes, by its number in `Jitter.order`."""
    from torchvision.transforms import functional

    changes = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    changed: Tensor = getattr(functional, changes[kind])(image, factor)
    return changed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("size", [(32, 32), (84, 84), (17, 40)], ids=str)
def test_boxes_equal_torchvisions_resized_crop(size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    from torchvision.transforms import functional

    x = augment.to_float(pictures(2, 30, 3, *size)).to(dtype)
    rng = Rng([0, 1], "t")
    boxes, mirrored = augment.draw_boxes(rng, 30, *size), rng.chance(0.5, 30)

    def slow(image: Tensor, run: int, item: int) -> Tensor:
        cut: Tensor = functional.resized_crop(image, *boxes[run, item].tolist(), list(size))
        return functional.hflip(cut) if mirrored[run, item] else cut

    worst = (augment.apply_boxes(x, boxes, mirrored) - one_by_one(slow, x)).abs().max()
    assert worst < tolerance  # measured: 2e-14 and 7e-6, at 84 pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_jitter_equals_torchvisions_changes_in_the_drawn_order(order: tuple[int, ...], channels: int) -> None:
    x = augment.to_float(difficult_pictures(2, 20)[:, :, :channels])
    drawn = augment.draw_jitter(Rng([0, 1], "t"), 20)._replace(order=torch.tensor(order).expand(2, 20, 4))

    def slow(image: Tensor, run: int, item: int) -> Tensor:
        for kind in order if drawn.chosen[run, item] else ():
            image = adjust(image, kind, float(drawn.factors[run, item, kind]))
        return image

    worst = (augment.apply_jitter(x, drawn) - one_by_one(slow, x)).abs().max()
    assert worst < 1e-5  # measured: 1.4e-6


def test_jitter_takes_each_images_own_order() -> None:
    x = augment.to_float(difficult_pictures(2, 48))
    orders = torch.tensor(list(itertools.permutations(range(4))))
    drawn = augment.draw_jitter(Rng([0, 1], "t"), 48, probability=1)
    drawn = drawn._replace(order=torch.stack([orders.repeat(2, 1), orders.flip(0).repeat(2, 1)]))
    together = augment.apply_jitter(x, drawn)
    for run, item in itertools.product(range(2), range(48)):
        own = augment.Jitter(*(part[run : run + 1, item : item + 1] for part in drawn))
        assert torch.equal(together[run, item], augment.apply_jitter(x[run, item][None, None], own)[0, 0])


def test_hue_equals_torchvisions_and_leaves_greys_alone() -> None:
    x = augment.to_float(difficult_pictures(2, 51))
    turns = torch.linspace(-0.5, 0.5, 102).view(2, 51)
    turned = augment.turn_hue(x, turns)
    slow = one_by_one(lambda image, run, item: adjust(image, augment.HUE, float(turns[run, item])), x)
    assert (turned - slow).abs().max() < 1e-5  # measured: 1.2e-6
    assert torch.equal(turned[..., 0], x[..., 0])  # the column of greys
    grey = torch.rand(2, 51, 1, 4, 4, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 3, -1, -1)
    assert torch.equal(augment.turn_hue(grey, turns), grey)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_equals_torchvisions_and_spares_the_others(channels: int) -> None:
    from torchvision.transforms import functional

    x = augment.to_float(difficult_pictures(2, 20)[:, :, :channels])
    chosen = Rng([0, 1], "t").chance(0.5, 20)
    slow = one_by_one(lambda image, run, item: functional.rgb_to_grayscale(image, channels), x)
    made = augment.apply_grey(x, chosen)
    assert (made - slow)[chosen].abs().max() < 1e-6
    assert torch.equal(made[~chosen], x[~chosen])


def photographs(runs: int, batch: int, channels: int, side: int) -> Tensor:
    """Smooth coloured bytes, closer to photographs than noise is."""
    coarse = pictures(1, runs * batch, channels, 6, 6)[0].float()
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return smooth.clamp(0, 255).round().to(torch.uint8).view(runs, batch, channels, side, side)


def torchvision_views(x: Tensor, seeds: list[int], kind: str, places: slice = slice(None)) -> Tensor:
    """The replay view of each image by torchvision, on the numbers that `replay_views` draws; `places` cuts the order.

    `kind` is what torchvision is given: "float" tensors, "uint8" tensors, or "pil" images as in the papers' code.
    """
    from torchvision.transforms import functional

    rng, (batch, channels, height, width) = Rng(seeds, "t"), x.shape[1:]
    boxes, mirrored = augment.draw_boxes(rng, batch, height, width), rng.chance(0.5, batch)
    drawn, grey = augment.draw_jitter(rng, batch), rng.chance(0.2, batch)
    before = {"float": augment.to_float, "uint8": lambda image: image, "pil": functional.to_pil_image}[kind]
    after = functional.pil_to_tensor if kind == "pil" else partial(augment.to_dtype, dtype=torch.uint8)

    def view(image: Tensor, run: int, item: int) -> Tensor:
        out = functional.resized_crop(before(image), *boxes[run, item].tolist(), [height, width])
        out = functional.hflip(out) if mirrored[run, item] else out
        for change in drawn.order[run, item].tolist()[places] if drawn.chosen[run, item] else ():
            out = adjust(out, change, float(drawn.factors[run, item, change]))
        out = functional.rgb_to_grayscale(out, channels) if grey[run, item] else out
        made: Tensor = out if kind == "uint8" else after(out)
        return made

    return one_by_one(view, x)


def byte_gaps(x: Tensor, slow: Tensor) -> Tensor:
    """By how much each byte of `replay_views` differs from the slow twin's."""
    return (augment.replay_views(x, Rng([0, 1], "t")).int() - slow.int()).abs().double()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 32, 84])
def test_replay_views_equal_torchvisions_on_floats(side: int, channels: int) -> None:
    x = photographs(2, 30, channels, side)
    gaps = byte_gaps(x, torchvision_views(x, [0, 1], "float"))
    assert gaps.max() <= 1  # a sum that falls on the other side of a half
    assert gaps.mean() < 0.002  # measured: 0.0004 at 84 pixels


@pytest.mark.parametrize(("kind", "most"), [("uint8", 10), ("pil", 40)])
@pytest.mark.parametrize("make", [photographs, pictures], ids=lambda make: make.__name__)
def test_replay_views_are_near_torchvisions_on_bytes(make: Callable[..., Tensor], kind: str, most: int) -> None:
    x = make(2, 100, 3, 32) if make is photographs else make(2, 100, 3, 32, 32)
    gaps = byte_gaps(x, torchvision_views(x, [0, 1], kind))
    assert gaps.mean() < 1.5  # measured: 1.2; torchvision cuts to bytes after each part
    assert gaps.flatten().quantile(0.99) <= 6  # measured: 3 and 6; in images its hue has 256 steps
    assert gaps.max() <= most  # measured: 6 and 18 here, 7 and 33 on more images


def test_the_byte_parity_has_teeth() -> None:
    x = photographs(2, 100, 3, 32)
    for places in (slice(None, None, -1), slice(3)):  # the order reversed, and the last change forgotten
        gaps = byte_gaps(x, torchvision_views(x, [0, 1], "pil", places))
        assert gaps.mean() > 2  # measured: 2.9 and 10.2
        assert gaps.flatten().quantile(0.99) > 20


def test_floats_stay_floats_between_0_and_1() -> None:
    for side in (7, 32):  # at 7 pixels the bilinear weights may sum to more than 1
        x = (torch.rand(4, 400, 3, side, side, generator=torch.Generator().manual_seed(0)) * 3 - 1).clamp(0, 1)
        x[:, :100] = x[:, :100].round()
        x[:, :300] = 1
        views = augment.replay_views(x, Rng(range(4), "t"))
        assert views.dtype == torch.float32
        assert float(views.min()) >= 0
        assert float(views.max()) <= 1


# What is drawn, as statistics. The seeds are fixed: a false alarm is a property of the seed, not of the day.

Draw = Callable[[Rng, int, int, int], Tensor]


def box_statistics(boxes: Tensor, height: int, width: int) -> Tensor:
    """Per box: area share, log aspect, their squares, and place.    Shapes: [N, 4] -> [6, N]."""
    top, left, tall, wide = boxes.double().unbind(-1)
    share, aspect = tall * wide / (height * width), (wide / tall).log()
    return torch.stack([share, aspect, share**2, aspect**2, top, left])


@cache
def torchvision_boxes(height: int, width: int) -> Tensor:
    """10,000 boxes by torchvision.    Shapes: -> [10000, 4]."""
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(10_000)])


def worst_box_z(draw: Draw) -> float:
    """The largest |z| between our boxes and torchvision's, over 6 statistics of 10,000 boxes in each of 4 image shapes."""
    worst = 0.0
    for height, width in ((32, 32), (24, 40), (16, 48), (48, 16)):  # one in 18 of the last two takes the centre
        ours = box_statistics(draw(Rng(range(10), "t"), 1000, height, width).flatten(0, 1), height, width)
        theirs = box_statistics(torchvision_boxes(height, width), height, width)
        gap, error = ours.mean(-1) - theirs.mean(-1), ((ours.var(-1) + theirs.var(-1)) / 10_000).sqrt()
        worst = max(
            worst, float((gap / error)[gap != 0].abs().max())
        )  # a constant that is the same in both has no error
    return worst


def test_boxes_are_spread_like_torchvisions() -> None:
    assert worst_box_z(augment.draw_boxes) < 4.5  # false alarm: 1 in 6000; measured: 2.1


def exchanged(rng: Rng, batch: int, height: int, width: int) -> Tensor:
    """The box's height taken for its width."""
    return augment.draw_boxes(rng, batch, height, width)[..., [0, 1, 3, 2]]


WRONG_DRAWS = {
    "scale of ImageNet training": partial(augment.draw_boxes, scale=(0.08, 1.0)),
    "largest areas left out": partial(augment.draw_boxes, scale=(0.2, 0.85)),
    "slightly taller boxes": partial(augment.draw_boxes, ratio=(0.7, 4 / 3)),
    "height and width exchanged": exchanged,
}


@pytest.mark.parametrize("wrong", WRONG_DRAWS.values(), ids=WRONG_DRAWS.keys())
def test_the_box_check_has_teeth(wrong: Draw) -> None:
    assert worst_box_z(wrong) > 6  # measured: 63, 13, 31, 73


def test_jitter_draws_uniform_factors_and_every_order_equally_often() -> None:
    drawn = augment.draw_jitter(Rng(range(20), "t"), 1200)
    for kind, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        factors = drawn.factors[..., kind].flatten().double().numpy()
        assert (
            stats.kstest((factors - low) / (high - low), "uniform").pvalue > 1e-4
        )  # false alarm: 1 in 2500 of the four
    weights = torch.tensor([64, 16, 4, 1])
    _, counts = np.unique((drawn.order * weights).sum(-1).numpy(), return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4  # false alarm: 1 in 10,000


def test_the_order_check_has_teeth() -> None:
    order = (
        Rng(range(20), "t").below(50, 1200, 4).argsort(dim=-1, stable=True)
    )  # 1 in 9 has a tie, which the first wins
    _, counts = np.unique((order * torch.tensor([64, 16, 4, 1])).sum(-1).numpy(), return_counts=True)
    assert stats.chisquare(counts).pvalue < 1e-9


def test_strengths_and_probabilities_of_the_jitter_are_those_asked_for() -> None:
    drawn = augment.draw_jitter(Rng(range(4), "t"), 1000, 0.1, 0.2, 1.5, 0.5, probability=0.3)
    low, high = drawn.factors.flatten(0, 1).min(0).values, drawn.factors.flatten(0, 1).max(0).values
    assert torch.allclose(low, torch.tensor([0.9, 0.8, 0.0, -0.5]), atol=0.01)  # factors are never below 0
    assert torch.allclose(high, torch.tensor([1.1, 1.2, 2.5, 0.5]), atol=0.01)
    assert abs(float(drawn.chosen.double().mean()) - 0.3) < 4.5 * math.sqrt(0.21 / 4000)  # false alarm: 7 in a million


def test_replay_views_mirror_half_jitter_four_fifths_and_grey_a_fifth() -> None:
    count = 20_000
    ramp = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1) + torch.linspace(
        0, 0.2, 4
    )  # brighter to the right, reddish to blue
    views = augment.replay_views(ramp.expand(10, count // 10, 3, 1, 4).expand(-1, -1, -1, 4, -1), Rng(range(10), "t"))
    plain = augment.replay_views(torch.full((10, count // 10, 1, 4, 4), 0.5), Rng(range(10), "t"))
    shares = {
        "mirrored": (augment.greys(views)[..., 0] > augment.greys(views)[..., -1]).all(-1).all(-1),
        "jittered": (plain - 0.5).abs().amax((2, 3, 4)) > 1e-3,
        "grey": (views.amax(2) - views.amin(2)).amax((-2, -1)) < 1e-6,
    }
    # A brightness factor within 0.002 of 1, drawn with probability 0.005, does not show.
    for name, expected in {"mirrored": 0.5, "jittered": 0.8 * 0.995, "grey": 0.2}.items():
        z = (float(shares[name].double().mean()) - expected) / math.sqrt(expected * (1 - expected) / count)
        assert abs(z) < 4.5, f"{name}: z = {z:.1f}"  # false alarm: 7 in a million each


@pytest.mark.parametrize(("side", "pixels"), [(8, 1), (28, 4), (32, 4), (64, 8)])
def test_a_shift_without_a_number_follows_the_size_of_the_image(side: int, pixels: int) -> None:
    fields = {"x": Field((1, side, side), torch.uint8)}
    x = torch.full((1, 40, 1, side, side), 255, dtype=torch.uint8)
    plain, numbered = (
        augment.pipeline([name], Rng([0], "size"), fields)({"x": x})["x"] for name in ("shift", f"shift:{pixels}")
    )
    assert torch.equal(plain, numbered)
    assert int((plain[0, :, 0] == 0).all(-1).sum(-1).amax()) == pixels  # the largest move of 40
