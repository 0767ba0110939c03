"""What a run says: plain lines anywhere, a live progress bar with the time left on a terminal, one table at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 15.0  # seconds between two progress lines where there is no terminal


def end(code: int) -> NoReturn:
    """End the process when all that it printed is written; a reader that has gone, as `head` does, is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python flushes once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def run(main: Callable[[], int]) -> NoReturn:
    """Call a command and end with its exit code; 1 where nobody reads what it prints any more."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1
    end(code)


class Console:
    """Writes to standard error, or to standard output for results."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """To standard output: it is the result."""
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        width = None if sys.stdout.isatty() else 160
        RichConsole(highlight=False, width=width).print(table)


class Bar:
    """A progress bar over `total` steps, or every 15 s a line; `note` stands behind it. `advance` after each step."""

    def __init__(self, console: Console, label: str, total: int, done: int = 0):
        self.console, self.label, self.total = console, label, total
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
