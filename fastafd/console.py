"""The output of a run: lines, progress bars (live on a terminal), and tables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 15.0  # seconds between two progress lines without a terminal


def end(code: int) -> NoReturn:
    """Write all buffered output, then end the process. A closed pipe, as with `| head`, is not an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would flush once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


class Console:
    """Writes lines and progress to standard error, and tables to standard output."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.stages = 0  # how many stages the job has
        self.at = 0  # the number of the current one, from 1

    def stage(self, name: str) -> None:
        """Begin the next stage: a line names it, and the bars show its number."""
        self.at += 1
        self.line(f"{self.where()}{name}")

    def where(self) -> str:
        """The number of the current stage, such as "3 of 6: "; empty for a job without stages."""
        return f"{self.at} of {self.stages}: " if self.at else ""

    def line(self, text: str) -> None:
        """Write one line."""
        self.rich.print(text, markup=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table to standard output, because it is a result."""
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        width = None if sys.stdout.isatty() else 160
        RichConsole(highlight=False, width=width).print(table)


class Bar:
    """A progress bar over `total` steps; without a terminal, a line every 15 s. `note` is shown behind it.

    done: steps that an earlier process did.
    """

    def __init__(self, console: Console, label: str, total: int, done: int = 0):
        self.console, self.label, self.total = console, console.where() + label, total
        self.done = self.began_at = done
        self.progress: Progress | None = None
        self.note = ""

    def __enter__(self) -> Bar:
        self.started = self.printed = time.monotonic()
        if self.console.rich.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            more = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self.progress = Progress(*columns, *more, console=self.console.rich, transient=True)
            self.task = self.progress.add_task(self.label, total=self.total, completed=self.done, note="")
            self.progress.start()
        return self

    def advance(self, count: int = 1) -> None:
        """Count that many more steps as done."""
        self.done += count
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, note=self.note)
            return
        now = time.monotonic()
        if now - self.printed >= PLAIN_EVERY_S:
            self.printed = now
            left = (now - self.started) / max(1, self.done - self.began_at) * (self.total - self.done)
            self.console.line(
                f"{self.label}: {self.done}/{self.total}, {left:.0f} s left{'; ' * bool(self.note)}{self.note}"
            )

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
