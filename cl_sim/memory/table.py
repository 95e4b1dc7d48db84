"""A table beside a memory or a pool: what a sample-adaptive method knows of each row.

Source: the state of Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised
Learning", and of Zhang et al. 2021, "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling".
Departures: a history is unknown until the first visit, which sets it to the loss seen; the sources start it at 0, where a
sample that was never seen would count as the easiest of all (`from_zero` does so). The experience in which a sample came is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_sim.adaptive import NONE, update_history
from cl_sim.runs import per_run

history_after = per_run(update_history)


class Table(nn.Module):
    """One line per memory slot, or per sample of a fixed pool. Row M, like a memory's, takes what is not to be kept.

    A memory resets the lines of every slot it fills anew (`Rows.keep_table`), so that a line is always about the sample
    that rests there. With `from_zero` histories start at 0 and all of them are known.

    Shapes: history [R, M + 1] float32; visits int32, 0: history unknown; naive bool; selected int64, the class chosen last
    with confidence, -1: none; since int16, the experience in which the sample came, from 0, -1: none yet; experience [], now.
    """

    history: Tensor
    visits: Tensor
    naive: Tensor
    selected: Tensor
    since: Tensor
    experience: Tensor

    def __init__(self, capacity: int, runs: int, device: torch.device | str = "cpu", from_zero: bool = False) -> None:
        super().__init__()
        self.capacity, self.from_zero = capacity, from_zero
        fresh = torch.zeros(runs, capacity + 1, device=device)
        self.register_buffer("history", fresh)
        self.register_buffer("visits", fresh.int())
        self.register_buffer("naive", fresh.bool())
        self.register_buffer("selected", fresh.long() + NONE)
        self.register_buffer("since", fresh.short() + NONE)
        self.register_buffer("experience", torch.zeros((), dtype=torch.int16, device=device))
        self.begun = 1  # experiences: the host's copy
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]

    @property
    def bytes_per_row(self) -> int:
        """What one line costs."""
        return sum(column.element_size() for column in self.buffers(recurse=False) if column.dim())

    def boundary(self) -> None:
        """An experience has ended; what comes from now on belongs to the next."""
        self.experience += 1
        self.begun += 1

    def reset(self, slot: Tensor) -> None:
        """Other samples rest there now: nothing is known of them but when they came.    Shapes: slot [R, n]."""
        for column, start in ((self.history, 0), (self.visits, 0), (self.naive, False), (self.selected, NONE)):
            column.scatter_(1, slot, start)
        self.since.scatter_(1, slot, self.experience.expand_as(slot))

    def came(self, slot: Tensor) -> None:
        """These samples have come, some of them for the first time.    Shapes: slot [R, n]."""
        before = self.since.gather(1, slot)
        self.since.scatter_(1, slot, torch.where(before < 0, self.experience, before))

    def visit(self, slot: Tensor, loss: Tensor, decay: float) -> None:
        """Note the losses of a batch. Of a slot that comes twice the last loss counts, and both visits.

        Shapes: slot [R, n] in 0..M, loss [R, n].
        """
        start = decay if self.from_zero else 0.0  # else nothing is known before the first visit
        weight = torch.where(self.visits > 0, decay, start)  # of the old value
        self.history.copy_(history_after(self.history, slot, loss, weight))
        self.visits.scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.int32))

    def choose(self, slot: Tensor, label: Tensor, sure: Tensor) -> None:
        """Note the class of the samples that are sure of one; the others keep what they had. Of twins the last sure one counts.

        Shapes: slot, label [R, n] int64, sure [R, n] bool.
        """
        if not slot.shape[1]:
            return
        place = torch.arange(slot.shape[1], device=slot.device).expand_as(slot).masked_fill(~sure, -1)
        last = torch.full_like(self.selected, -1).scatter_reduce(1, slot, place, "amax")  # [R, M + 1]
        chosen = label.gather(1, last.clamp(min=0))
        self.selected.copy_(torch.where(last >= 0, chosen, self.selected))

    def is_naive(self, slot: Tensor) -> Tensor:
        """The flags of some rows.    Shapes: slot [R, n] -> [R, n] bool."""
        return self.naive.gather(1, slot)

    def known(self, visits: int = 1) -> Tensor:
        """Whose history is known, by so many visits?    Shapes: -> [R, M] bool."""
        return self.visits[:, : self.capacity] >= (0 if self.from_zero else visits)

    def mark(self, flags: Tensor) -> None:
        """Set the flags of all rows.    Shapes: flags [R, M] bool."""
        self.naive[:, : self.capacity] = flags


def _recount(table: Any, keys: Any) -> None:
    table.begun = int(table.experience) + 1
