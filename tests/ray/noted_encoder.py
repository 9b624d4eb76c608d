"""What the replicas of these tests serve, each in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cudagraph_jax import CUDAGraphMode
from tests.helpers.tiny_encoder import TinyEncoder

ILL = "ill"


class NotedEncoder(TinyEncoder):
    """One that notes its warm-up in a folder, and that the text "ill" makes unready."""

    def __init__(self, folder: Path) -> None:
        super().__init__(store=str(folder / "graphs"))
        self.folder = folder

    def warmup(self, *, progress: Any = False) -> object:
        report = super().warmup(progress=progress)
        registry = self.function.registry
        note = self.folder / f"{os.getpid()}.part"
        note.write_text(json.dumps([registry.capture_count, registry.load_count]))
        note.rename(note.with_suffix(".warm"))
        return report

    def item(self, row: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if list(row) == self.tokenize([ILL])[0]:
            self.function.manager.mode = CUDAGraphMode.CAPTURE
        return super().item(row)


def warm_ups(folder: Path) -> dict[int, tuple[int, int]]:
    """How many buckets each process compiled and loaded, by its id, the first one first."""
    notes = sorted(folder.glob("*.warm"), key=lambda note: note.stat().st_mtime_ns)
    return {int(note.stem): tuple(json.loads(note.read_text())) for note in notes}
