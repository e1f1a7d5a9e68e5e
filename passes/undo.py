"""Undoing what was begun, Ctrl-C included.

What is given to undo must be harmless when there is nothing to undo: it is run twice, for Ctrl-C may cut the first time
short.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def undone_after(undo: Callable[[], object]) -> Iterator[None]:
    """Run `undo` at the end, whatever happens. What is to be undone starts inside."""
    with ExitStack() as stack:
        stack.callback(undo)
        stack.callback(undo)
        yield


@contextmanager
def undone_on_failure(undo: Callable[[], object]) -> Iterator[None]:
    """Run `undo` where the block raises."""
    try:
        yield
    except BaseException:
        with undone_after(undo):
            raise
