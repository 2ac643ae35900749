"""A progress bar around work on many images."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def with_bar(
    chunks: Iterable[T], total: int, title: str, count: Callable[[T], int], is_slow: Callable[[], bool]
) -> Iterator[T]:
    """The chunks, with a bar on a terminal once `is_slow()`. `count` gives the images of a chunk, `total` of all."""
    from rich.console import Console  # here, since without rich everything but the bar works
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console()
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    task = bar.add_task("", total=total)
    try:
        for chunk in chunks:
            if is_slow() and not bar.live.is_started:
                bar.start()
            yield chunk
            bar.advance(task, count(chunk))
    finally:
        bar.stop()
