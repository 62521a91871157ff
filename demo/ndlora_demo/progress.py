"""What the demo says while it works: bars on a terminal, lines anywhere else."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["SILENCE", "Bars"]

SILENCE = 10.0  # seconds: where there is no terminal, a line is never later than this


class Bars:
    """Progress bars, one for each piece of work, with a note at its end; a context manager.

    Where there is no terminal, each piece prints a line when it starts and when it ends, and one after every
    ``silence`` seconds without any: from a thread of its own, since one piece may take longer than that.
    """

    def __init__(self, console: Console, *, silence: float = SILENCE) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._silence, self._said, self._ended = silence, time.monotonic(), threading.Event()
        self._speaker = threading.Thread(target=self._break_silence, daemon=True)

    def __enter__(self) -> Bars:
        self._progress.start()
        if not self._progress.console.is_terminal:  # where bars are drawn only once, at the very end
            self._speaker.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        if self._speaker.is_alive():
            self._speaker.join()
        self._progress.stop()

    def start(self, label: str, total: int, note: str = "started") -> None:
        """Begin a piece of work of ``total`` steps."""
        self._task = self._progress.add_task(label, total=total, note=note)
        self._say(note)

    def step(self, note: str, advance: int = 1) -> None:
        """Go ``advance`` steps on; ``note`` says how it stands."""
        self._progress.update(self._task, advance=advance, note=note)

    def finish(self, note: str) -> None:
        """The last step; ``note`` says what came out."""
        self.step(note)
        self._say(note)

    def _say(self, note: str) -> None:
        if not self._progress.console.is_terminal:
            self._said = time.monotonic()
            self._progress.console.print(f"{self._progress.tasks[-1].description}: {note}")

    def _break_silence(self) -> None:
        while not self._ended.wait(max(0.0, self._said + self._silence - time.monotonic())):
            if self._progress.tasks and time.monotonic() - self._said >= self._silence:
                now = self._progress.tasks[-1]
                self._say(f"{now.completed:.0f} of {now.total:.0f}, {now.fields['note']}")
