"""A bank of instances by key: what is remembered of each, for strategies that number their instances or classes themselves.

Source: as `cl_sim.memory.tracks`. With class labels as keys it stores class prototypes that a wrong sample hardly moves (ours).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import vmap  # type: ignore[attr-defined]

from cl_sim.errors import BadConfig, ClSimError
from cl_sim.memory.tracks import Readout, Tracks, ageing, clear, empty, store


class InstanceBank(nn.Module):
    """Newest vectors and running averages of K keys, 0 to K - 1, for R runs, without gradients.

    Vectors of one key in one batch are taken one after the other. With `max_age` above 0, `tick` forgets keys that were not
    observed for more ticks than that.

    Shapes: of each field of `Tracks` [R, K, ...].    Raises: BadConfig for a size below 1.
    """

    def __init__(
        self, runs: int, keys: int, dim: int, history: int = 10, max_age: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        if min(runs, keys, dim, history) < 1 or max_age < 0:
            raise BadConfig(
                f"a bank of {keys} keys, {dim} features and {history} vectors for {runs} runs cannot be; each must be at "
                "least 1, and max_age 0 (never forget) or more"
            )
        self.max_age = max_age
        start = empty(keys, history, torch.zeros(dim, device=device))
        for name, field in zip(Tracks._fields, start, strict=True):
            self.register_buffer(name, field.expand(runs, *field.shape).clone())

    @property
    def tracks(self) -> Tracks:
        """Everything that is stored.    Shapes: each field [R, K, ...]."""
        return Tracks(*(self.get_buffer(name) for name in Tracks._fields))

    @torch.no_grad()
    def observe(
        self, keys: Tensor, embeddings: Tensor, scores: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Store vectors under their keys; those that are not valid are left out.

        Shapes: keys [R, N] int64, embeddings [R, N, D], scores [R, N] (none: 1), valid [R, N] bool (none: all).
        """
        self._keep(observed(self.tracks, keys, embeddings, scores, valid))

    @torch.no_grad()
    def tick(self) -> None:
        """A frame has passed: every key is a tick older, and those that are too old are forgotten."""
        now = self.tracks
        older, alive = ageing(now.age, torch.zeros_like(now.alive), self.max_age)
        aged = now._replace(age=older)
        self._keep(vmap(clear)(aged, ~alive & now.alive) if self.max_age else aged)

    def read(self, readout: Readout = "similarity") -> Tensor:
        """What each key offers; zeros for keys without a vector.    Shapes: -> [R, K, D]."""
        return read(self.tracks, readout)

    def reset(self) -> None:
        """Forget everything, in place."""
        self._keep(vmap(clear)(self.tracks, torch.ones_like(self.tracks.alive)))

    @property
    def nbytes(self) -> int:
        """What the vectors of one run cost: keys times (history + 2) times features times bytes."""
        now = self.tracks
        return sum(field[0].numel() * field.element_size() for field in (now.average, now.slow, now.history))

    @contextmanager
    def differentiable(self) -> Iterator[LiveBank]:
        """A copy that keeps the graph, for one clip inside one training step; afterwards every use of it is an error."""
        live = LiveBank(Tracks(*(field.detach().clone() for field in self.tracks)))
        try:
            yield live
        finally:
            live.close()

    def _keep(self, new: Tracks) -> None:
        for name, field in zip(Tracks._fields, new, strict=True):
            self.get_buffer(name).copy_(field)


class LiveBank:
    """A bank whose vectors are part of a graph. It ends with the step that made it; made by `InstanceBank.differentiable`."""

    def __init__(self, tracks: Tracks) -> None:
        self._tracks: Tracks | None = tracks

    @property
    def tracks(self) -> Tracks:
        """Everything that is stored.    Raises: ClSimError after the step."""
        if self._tracks is None:
            raise ClSimError(
                "this bank kept the graph of a training step that is over; make a new one with bank.differentiable(), or store "
                "vectors that outlive the step with bank.observe(...)"
            )
        return self._tracks

    def observe(
        self, keys: Tensor, embeddings: Tensor, scores: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """As `InstanceBank.observe`, but gradients will reach the vectors."""
        self._tracks = observed(self.tracks, keys, embeddings, scores, valid)

    def read(self, readout: Readout = "similarity") -> Tensor:
        """What each key offers, with its graph.    Shapes: -> [R, K, D]."""
        return read(self.tracks, readout)

    def close(self) -> None:
        """Let go of the graph."""
        self._tracks = None


def read(tracks: Tracks, readout: Readout) -> Tensor:
    """What each key offers.    Shapes: fields [R, K, ...] -> [R, K, D]."""
    offered: Tensor = vmap(lambda one: one.read(readout))(tracks)
    return offered


def observed(
    tracks: Tracks, keys: Tensor, embeddings: Tensor, scores: Tensor | None = None, valid: Tensor | None = None
) -> Tracks:
    """The tracks after storing vectors under their keys, one after the other.    Shapes: as `InstanceBank.observe`."""
    slots = torch.arange(tracks.id.shape[1], device=keys.device)
    given = torch.ones(keys.shape, device=keys.device) if scores is None else scores
    counts = torch.ones_like(keys, dtype=torch.bool) if valid is None else valid
    for place in range(keys.shape[1]):
        hit = (slots == keys[:, place, None]) & counts[:, place, None]  # [R, K]
        new = embeddings[:, place, None].to(tracks.average.dtype).expand_as(tracks.average)
        score = given[:, place, None].to(tracks.scores.dtype).expand_as(hit)
        tracks = vmap(store)(tracks, hit, new, score)
        tracks = tracks._replace(id=torch.where(hit, slots, tracks.id))
    return tracks
