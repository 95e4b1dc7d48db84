"""Checkpoints: one file, written whole or not at all, refused when damaged or foreign.

Layout: a line naming the format, a line with the SHA-256 of the rest, then a torch archive that holds only tensors and
plain values (so that loading one never runs code).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_sim.errors import BadCheckpoint

FORMAT = b"cl-sim checkpoint 1\n"
KEPT = 2


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` atomically and keep the last two.

    Raises: OSError if the disk is full; what was there before stays.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getvalue()
    path = folder / f"checkpoint-{step:09d}.pt"
    draft = path.with_suffix(".tmp")
    try:
        with draft.open("wb") as file:
            file.write(FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    for old in listed(folder)[:-KEPT]:
        old.unlink()
    return path


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def load(path: Path, device: torch.device, owner: str) -> dict[str, Any]:
    """Read one checkpoint.

    Raises: BadCheckpoint if it is damaged, of another format, or written by a run that is not `owner`.
    """
    content = path.read_bytes()
    if not content.startswith(FORMAT):
        raise BadCheckpoint(f"{path} is not a cl-sim checkpoint of this version (or its first bytes are damaged)")
    digest, _, body = content[len(FORMAT) :].partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise BadCheckpoint(f"{path} is damaged: its content does not match its checksum")
    state: dict[str, Any] = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    if state["owner"] != owner:
        raise BadCheckpoint(f"{path} belongs to another run: it was written for {state['owner']}, this is {owner}")
    return state


def latest(folder: Path, device: torch.device, owner: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest usable checkpoint and the reasons why newer ones were refused; None if there is none at all.

    Raises: BadCheckpoint if there are checkpoints and none can be used.
    """
    refused: list[str] = []
    for path in reversed(listed(folder)):
        try:
            return load(path, device, owner), refused
        except BadCheckpoint as error:
            refused.append(str(error))
    if refused:
        raise BadCheckpoint("no usable checkpoint: " + "; ".join(refused))
    return None, refused
