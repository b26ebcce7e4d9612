"""What a training writes down: one JSON line per event, TensorBoard scalars if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.core.errors import MissingExtraError


class Log:
    """A JSONL file, and TensorBoard beside it.

    Lines of a killed run that lie beyond the step it resumes from are dropped, so that the file of a
    resumed run is that of a straight one.

    Args:
        folder: where `log.jsonl` and `tensorboard/` go.
        step: the step that training starts or resumes from.
        tensorboard: write scalars for TensorBoard too.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        kept = [line for line in self.lines() if line["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    def lines(self) -> list[dict[str, Any]]:
        """Everything written so far; a line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                break  # the last line of a killed run
        return found

    def write(self, step: int, **figures: Any) -> None:
        """One event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "logging for TensorBoard") from error
    return SummaryWriter(str(folder), purge_step=step)
