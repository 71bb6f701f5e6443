"""How far a command is: a bar on a terminal, a plain log line every few seconds elsewhere."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)
EVERY = 5.0  # seconds between log lines


class ProgressDisplay:
    """Shards or epochs done, speed, a note, and time left. `work` is whatever total the time left is estimated from."""

    def __init__(self, title: str, steps: int, work: float, unit: str = "shards") -> None:
        self.title, self._steps, self._work, self._unit = title, steps, max(work, 1), unit
        self._start = time.monotonic()
        self._last = self._start
        self._skipped = 0.0  # work already done when this run began
        self._bar: Progress | None = None
        self._text = ""
        if sys.stderr.isatty():
            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit + " {task.fields[text]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=steps, text="")

    def __enter__(self) -> "ProgressDisplay":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._text:
            log.info("%s: %s", self.title, self._text)

    def skip(self, work: float) -> None:
        self._skipped = work

    def update(self, steps: int, work: float, items: int, note: str = "") -> None:
        """steps done of the total, work done of the total, items (images) handled in this run."""
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-6)
        fresh = work - self._skipped
        left = elapsed * (self._work - work) / fresh if fresh > 0 else None
        self._text = f"{steps}/{self._steps} {self._unit}, {items} images, {items / elapsed:.0f} images/s"
        self._text += f", {note}" if note else ""
        self._text += f", {left:.0f} s left" if left is not None and steps < self._steps else ""
        if self._bar:
            self._bar.update(self._task, completed=steps, text=self._text.partition(", ")[2])
        elif now - self._last >= EVERY:
            self._last = now
            log.info("%s: %s", self.title, self._text)
