"""Encoders: the published sizes, the run axis, freezing, and scaling of pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_sim import encoders, testing
from cl_sim.encoders.classifier import Classifier, CosineClassifier
from cl_sim.errors import BadConfig, ClSimError, UnknownName
from cl_sim.optim import trainable
from cl_sim.runs import Lift, join, per_run
from cl_sim.types import Field

BYTE = torch.uint8


def build(name: str, shape: tuple[int, ...], **settings: Any) -> encoders.Pixels:
    return encoders.build(name, encoders.config_class(name)(**settings), Field(shape, BYTE))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(BYTE)


@pytest.mark.parametrize(("pixels", "dim"), [(28, 160), (32, 160), (64, 640), (84, 640)])
def test_the_reduced_resnet_has_the_published_size(pixels: int, dim: int) -> None:
    net = build("reduced_resnet18", (3, pixels, pixels))
    assert sum(p.numel() for p in net.parameters()) == 1_093_140
    assert net.dim == dim
    assert net.eval()(images(2, 3, pixels, pixels)).shape == (2, dim)


def test_the_full_resnet_is_the_same_net_at_width_64() -> None:
    net = build("resnet18", (3, 32, 32))
    assert net.dim == 512
    # torchvision's ResNet-18 without its head, with a 3x3 stem instead of 7x7: 11,176,512 - 64 * 3 * (49 - 9)
    assert sum(p.numel() for p in net.parameters()) == 11_176_512 - 64 * 3 * 40


def test_the_resnet_equals_torchvisions_blocks() -> None:
    from torchvision.models.resnet import BasicBlock

    ours = build("reduced_resnet18", (3, 32, 32), width=4).encoder.stages[2].eval()
    theirs = BasicBlock(4, 8, 2, torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1, 2, bias=False), torch.nn.BatchNorm2d(8)))
    theirs.eval().load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_pixels_are_bytes_over_255_then_standardised() -> None:
    net = build("mlp", (3, 2, 2), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    seen: list[torch.Tensor] = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = images(1, 3, 2, 2)
    net(x)
    net(x.float() / 255)
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        torch.testing.assert_close(seen[0][0, channel], (x[0, channel] / 255 - mean) / std)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("make", [Classifier, lambda encoder, classes: CosineClassifier(encoder, classes, 10.0)])
def test_stacked_runs_equal_each_alone_and_so_do_batchnorm_statistics(make: Any) -> None:
    nets = [make(build("reduced_resnet18", (3, 32, 32), width=4), 5) for _ in range(3)]
    alone = [Lift([copy.deepcopy(net)]) for net in nets]
    stacked = Lift(nets)
    x = torch.stack([images(6, 3, 32, 32, seed=s) for s in range(3)])
    for mode in (True, False):
        stacked.train(mode)
        together = stacked(x)
        for run, lift in enumerate(alone):
            lift.train(mode)
            torch.testing.assert_close(together[run], lift(x[run : run + 1])[0], rtol=1e-4, atol=1e-5)
    for name, buffer in stacked.net.named_buffers():
        for run, lift in enumerate(alone):
            torch.testing.assert_close(buffer[run], lift.net.get_buffer(name), rtol=1e-4, atol=1e-6)


def test_gradients_of_stacked_runs_stay_apart() -> None:
    nets = [Classifier(build("mlp", (1, 4, 4), hidden=(8,)), 3) for _ in range(2)]
    alone, stacked = Lift([copy.deepcopy(nets[1])]), Lift(nets)
    x = torch.stack([images(5, 1, 4, 4, seed=s) for s in range(2)])
    stacked(x).square().mean((1, 2)).sum().backward()
    alone(x[1:]).square().mean((1, 2)).sum().backward()
    for many, one in zip(stacked.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(many.grad[1], one.grad)


def test_a_frozen_encoder_neither_learns_nor_moves_its_statistics() -> None:
    net = Classifier(build("reduced_resnet18", (3, 32, 32), width=4, frozen=True), 5).train()
    before = {name: value.clone() for name, value in net.encoder.state_dict().items()}
    net(images(4, 3, 32, 32)).sum().backward()
    assert trainable(net) == list(net.head.parameters())
    assert all(p.grad is None for p in net.encoder.parameters())
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_cosine_classifier_answers_scaled_cosines() -> None:
    net = CosineClassifier(build("mlp", (1, 4, 4), hidden=(8,)), 3, scale=10.0)
    x = images(5, 1, 4, 4)
    expected = 10 * torch.cosine_similarity(net.encoder(x)[:, None], net.head.weight[None], dim=-1)
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)
    assert net.head.bias is None


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision:mobilenet_v3_small", "vit_b_16"])
def test_a_torchvision_model_answers_its_features(name: str) -> None:
    if name == "vit_b_16":
        with pytest.raises(BadConfig, match="cannot take images"):
            build(name, (3, 32, 32))
        return
    net = build(name, (1, 64, 64))
    assert net.eval()(images(2, 1, 64, 64)).shape == (2, net.dim)


def test_unknown_encoders_and_weights_are_refused_with_what_there_is() -> None:
    with pytest.raises(UnknownName, match="did you mean 'resnet18'"):
        encoders.config_class("resnet81")
    with pytest.raises(BadConfig, match="weights"):
        build("resnet34", (3, 64, 64), weights="NOTHING")
    with pytest.raises(BadConfig, match="needs images"):
        build("reduced_resnet18", (7,))
    with pytest.raises(BadConfig, match="give both or none"):
        build("mlp", (3, 4, 4), mean=(0.5, 0.5, 0.5))


def test_timm_models_need_timm() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(ClSimError, match="pip install timm"):
            build("timm:resnet18", (3, 32, 32))


def test_the_default_depends_on_the_samples() -> None:
    assert encoders.default(Field((3, 32, 32), BYTE)) == "reduced_resnet18"
    assert encoders.default(Field((1, 8, 8), BYTE)) == "mlp"
    assert encoders.default(Field((46,), torch.float32)) == "mlp"


def test_per_run_lifts_a_loss_and_shares_keywords() -> None:
    loss = per_run(lambda x, y, power: ((x - y) ** power).mean())
    x, y = torch.rand(3, 4), torch.rand(3, 4)
    torch.testing.assert_close(loss(x, y, power=2), (x - y).square().mean(1))
    torch.testing.assert_close(loss(x[:1], y[:1], power=2), (x[:1] - y[:1]).square().mean(1))


def test_join_keeps_the_shared_columns_in_order() -> None:
    one = {"x": torch.zeros(2, 3, 5), "y": torch.zeros(2, 3), "extra": torch.zeros(2, 3)}
    two = {"x": torch.ones(2, 4, 5), "y": torch.ones(2, 4)}
    both = join(one, two)
    assert set(both) == {"x", "y"}
    assert both["y"].tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2


def in_bf16(name: str, shape: tuple[int, ...], **settings: Any) -> encoders.Pixels:
    return encoders.build(name, encoders.config_class(name)(**settings), Field(shape, BYTE), "bf16")


@pytest.mark.parametrize(("name", "settings"), [("reduced_resnet18", {"width": 4}), ("mlp", {"hidden": [32]})])
def test_bf16_is_the_same_encoder_to_three_digits_with_float32_around_it(name: str, settings: dict[str, Any]) -> None:
    one, two = build(name, (3, 32, 32), **settings), in_bf16(name, (3, 32, 32), **settings)
    two.load_state_dict(one.state_dict())
    x = images(20, 3, 32, 32)
    exact, rounded = one(x), two(x)
    assert rounded.dtype == torch.float32
    gap = float(((exact - rounded).norm() / exact.norm()).detach())
    assert 1e-5 < gap < 0.02  # bfloat16 keeps 8 bits; a net that ignored the setting would have a gap of 0
    rounded.square().sum().backward()
    assert {parameter.dtype for parameter in two.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in two.parameters() if parameter.grad is not None} == {torch.float32}
    statistics = [buffer for buffer in two.buffers() if buffer.is_floating_point()]
    assert all(buffer.dtype == torch.float32 for buffer in statistics)


def test_a_head_on_a_bf16_encoder_computes_in_float32() -> None:
    net = CosineClassifier(in_bf16("mlp", (3, 4, 4), hidden=[16]), 5, 10.0)
    x = images(8, 3, 4, 4)
    features = net.encoder(x)
    weights = net.head.weight
    cosines = features @ weights.T / (features.norm(dim=1)[:, None] * weights.norm(dim=1))
    torch.testing.assert_close(net(x), 10 * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("check", [testing.resumes_bit_for_bit, testing.learns_a_toy_stream], ids=lambda c: c.__name__)
def test_a_strategy_in_bf16_keeps_its_promises(check: Callable[[testing.Make], None]) -> None:
    check(lambda seeds: testing.toy("er", seeds, {"precision": "bf16"}))


def test_stacked_runs_in_bf16_answer_as_alone_within_its_rounding() -> None:
    alone, stacked = (testing.toy("er", seeds, {"precision": "bf16"}) for seeds in ((1,), (0, 1)))
    batch = alone.stream.batch(0)
    many = {key: value.expand(2, *value.shape[1:]) for key, value in batch.items()}
    with torch.inference_mode():
        one, two = alone.strategy.predict(batch)[0], stacked.strategy.predict(many)[1]
    torch.testing.assert_close(one, two, rtol=0.02, atol=0.02)


def test_bf16_is_refused_where_it_is_not_made() -> None:
    from cl_sim.encoders.transformer import SASRecConfig

    lists = {"items": Field((10,), torch.int32)}
    with pytest.raises(BadConfig, match=r"'bf16'.*'sasrec'.*--precision"):
        encoders.make("sasrec", SASRecConfig(), lists, 31, "bf16")
