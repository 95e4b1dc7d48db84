"""Tasks that show their samples again and again: which of them come at a step, found when the step is made.

Source: ours. The order of everything is never held: a million steps of 448 samples would be 4 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cl_sim.rng import Rng, host_rng


class Repeats:
    """Places in the order of a single showing, step by step.

    In passes, the first in the given order, each further one in a new order, which is made when it begins; or, with
    `replacement`, drawn uniformly and independently. Everything depends on the seeds and the step alone; one order is kept.

    Units: sizes, samples of each task (in passes: whole batches); steps, of each task in all.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sizes: Sequence[int],
        steps: Sequence[int],
        *,
        batch: int,
        replacement: bool,
        device: torch.device,
    ) -> None:
        self.seeds, self.sizes, self.batch, self.replacement, self.device = seeds, sizes, batch, replacement, device
        self.first_place = np.cumsum([0, *sizes])
        self.first_step = np.cumsum([0, *steps])
        self.steps = steps
        self.draw = Rng(seeds, "drawn samples", device)
        self.order: tuple[tuple[int, int], Tensor] = ((-1, -1), torch.empty(0))

    def __len__(self) -> int:
        """Number of steps."""
        return int(self.first_step[-1])

    def on(self, device: torch.device) -> Repeats:
        """The same on another device, or for another thread: what is kept of it is its own."""
        return Repeats(
            self.seeds, self.sizes, self.steps, batch=self.batch, replacement=self.replacement, device=device
        )

    def places(self, step: int) -> Tensor:
        """Where the samples of this step lie.    Shapes: -> [R, B] int64."""
        task = int(np.searchsorted(self.first_step, step, side="right")) - 1
        start = int(self.first_place[task])
        if self.replacement:
            self.draw.counter.fill_(step * self.batch)
            return start + self.draw.below(self.sizes[task], self.batch)
        turn, number = divmod(step - int(self.first_step[task]), self.sizes[task] // self.batch)
        if self.order[0] != (task, turn):
            self.order = (task, turn), self.pass_order(task, turn)
        return start + self.order[1][:, number * self.batch : (number + 1) * self.batch]

    def pass_order(self, task: int, turn: int) -> Tensor:
        """The order of one pass over a task.    Shapes: -> [R, size of the task]."""
        size = self.sizes[task]
        if not turn:
            return torch.arange(size, device=self.device).expand(len(self.seeds), -1)
        hosts = [host_rng(seed, f"pass {turn} of task {task}") for seed in self.seeds]
        return torch.as_tensor(np.stack([host.permutation(size) for host in hosts]), device=self.device)
