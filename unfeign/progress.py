"""How far a long operation has come: a bar with the time left on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]


def ignored(units: int) -> None:
    """Progress that nobody watches."""


EVERY = 30.0  # seconds between lines in a log


@contextmanager
def progress(
    what: str, total: int, done: int = 0, *, lines: bool = True, console: Console | None = None
) -> Iterator[Advance]:
    """Show an operation's progress for a block; what is printed meanwhile stands above the bar.

    Args:
        what: the operation, in a word or two.
        total: its units of work.
        done: those done before.
        lines: whether a log gets lines, too; not for work that speaks for itself.
        console: where to show it; standard output by default.

    Yields:
        A function to call with the number of units just done.
    """
    console = console or Console()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda units: bar.advance(task, units)
        return
    said = time.monotonic()

    def advance(units: int) -> None:
        nonlocal done, said
        done += units
        if lines and time.monotonic() - said >= EVERY and done < total:
            said = time.monotonic()
            console.print(f"{what}: {done}/{total}", highlight=False)

    yield advance
