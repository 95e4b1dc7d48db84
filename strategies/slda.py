"""SLDA: streaming linear discriminant analysis. Class means and one covariance of features from an encoder that never learns.

Source: Hayes and Kanan 2020, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", and its code.
Symbols: z_t -> z, mu_k -> total / count, c_k -> count, t Sigma -> scatter, epsilon -> shrinkage, Lambda -> inverse.
Departures: a batch is learned in one go, by the very sums that its samples would make one after the other; there is no base
initialisation (the paper may start from means and covariance of a first part of the data), so, as in the code without it,
the first sample of each class deviates from the mean 0. Sums and inverse are in float64 (the code: float32). Classes that
have not come score minus infinity.

The encoder is used as it is made, in evaluation mode, whether or not `encoder.frozen` is set. What the method is meant for is
a pretrained one: `--set encoder.name=torchvision:resnet18 --set encoder.weights=DEFAULT`. Without weights, the features are a
random, fixed function of the pixels (another one per seed), and the result says how far a linear classifier gets on those:
a reference that cannot forget, not the method of the paper. Such features may be much smaller than those the paper's
shrinkage is meant for (reduced ResNet-18: a mean variance near 1e-5, so that 1e-4 of the identity drowns the covariance, and
26 % of CIFAR-10 are right after 4,000 samples); `target=variance` shrinks in the features' own unit (37 %; ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cl_sim.config import at_least, within
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs


@dataclass(frozen=True, kw_only=True)
class SLDAConfig:
    """Settings of streaming linear discriminant analysis."""

    shrinkage: float = 1e-4  # share of the target in the covariance that is inverted
    target: Literal["identity", "variance"] = "identity"  # or the identity times the features' mean variance

    def __post_init__(self) -> None:
        at_least(self, shrinkage=1e-12)
        within(self, 0, 1, "shrinkage")


class SLDA(Strategy):
    """Linear discriminant analysis, a sample at a time. The read-out is kept until a state is loaded or the mode is set."""

    Config, tasks = SLDAConfig, frozenset({"classify"})
    total: Tensor  # [R, C, D] float64, as all sums: of 50,000 outer products float32 would lose the small directions
    count: Tensor  # [R, C]
    scatter: Tensor  # [R, D, D]

    def __init__(self, cfg: SLDAConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.encode = env.lift(env.encoder).requires_grad_(False).eval()
        width = int(self.encode.net.dim)  # type: ignore[arg-type]
        zeros = partial(torch.zeros, dtype=torch.float64, device=env.device)
        self.register_buffer("total", zeros(env.runs, env.classes, width))
        self.register_buffer("count", zeros(env.runs, env.classes))
        self.register_buffer("scatter", zeros(env.runs, width, width))
        self.classes = torch.arange(env.classes, device=env.device)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> SLDA:
        """Forget the read-out; leave the encoder in evaluation mode."""
        super().train(mode)
        self.encode.eval()
        self.kept = None
        return self

    @torch.no_grad()
    def observe(self, new: Batch) -> Logs:
        """Add the batch to means and covariance."""
        view = self.env.augment(new)
        z, y = self.encode(view["x"]).double(), view["y"]  # [R, B, D], [R, B]
        off = away(z, y, self.total, self.count)
        member = (y[..., None] == self.classes).double()  # [R, B, C]
        self.scatter += off.mT @ off
        self.total += member.mT @ z
        self.count += member.sum(1)
        return {"spread": off.square().mean((1, 2)).float()}

    def predict(self, batch: Batch) -> Tensor:
        """Linear discriminants of the features.    Shapes: -> [R, B, C]."""
        if self.kept is None or self.training:
            self.kept = self.read_out()
        weight, bias = self.kept
        z: Tensor = self.encode(batch["x"]).double()
        return (z @ weight + bias[:, None]).float()

    def read_out(self) -> tuple[Tensor, Tensor]:
        """Weights Lambda mu_k and biases -mu_k Lambda mu_k / 2; zero before the first batch.    Shapes: -> [R, D, C], [R, C]."""
        seen, epsilon = self.count > 0, self.cfg.shrinkage
        mu = self.total / self.count.clamp(min=1)[..., None]  # [R, C, D]
        sigma = self.scatter / self.count.sum(1).clamp(min=1)[:, None, None]  # [R, D, D]
        target = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
        if self.cfg.target == "variance":
            target = target * sigma.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        inverse = torch.linalg.pinv((1 - epsilon) * sigma + epsilon * target, hermitian=True)  # Lambda
        weight = inverse @ mu.mT
        bias = -(mu.mT * weight).sum(1) / 2
        return weight, bias.masked_fill(~seen & seen.any(1, keepdim=True), -torch.inf)


@per_run
def away(z: Tensor, y: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """How far each sample is from the mean of its class before it, times sqrt(t / (t + 1)), t being the samples before it.

    The update t -> t + 1 of the source, (t Sigma + t / (t + 1) d d') / (t + 1), makes t Sigma a plain sum of outer products, so
    the rows returned add their Gram matrix to it. The mean before a sample is that of the earlier batches and of the
    earlier samples of its own batch; it is 0 before the first.

    Shapes: z [B, D], y [B], total [C, D], count [C] -> [B, D].
    """
    before = (y[:, None] == y).to(z.dtype).tril(-1)  # [B, B] the earlier samples of the same class
    known = count[y] + before.sum(1)  # [B]
    mean = (total[y] + before @ z) / known.clamp(min=1)[:, None]
    t = count.sum() + torch.arange(len(y), device=y.device)
    return (t / (t + 1)).sqrt()[:, None] * (z - mean)


def _forget(strategy: Any, keys: Any) -> None:
    strategy.kept = None
