"""What a block changed for a while, put back also when Ctrl-C comes once more while that is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def undoing(put_back: Callable[[], None]) -> Iterator[None]:
    """Calls `put_back` when the block ends, however it does; it may be called again, and must then change nothing.

    Python lets a Ctrl-C into every line, those of a `finally` and of `__exit__` too, and whatever should come behind
    does not. So it is the signal's handler that puts back, before it raises: of several, the last one does all of it.
    """
    before = signal.getsignal(signal.SIGINT)
    reached = callable(before) and threading.current_thread() is threading.main_thread()  # no other thread is

    def interrupted(number: int, frame: FrameType | None) -> None:
        try:
            if callable(before):
                before(number, frame)  # Python's own raises KeyboardInterrupt; one that does not lets the block go on
        except BaseException:
            put_back()
            signal.signal(signal.SIGINT, before)
            raise

    if reached:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        put_back()
        if reached:
            signal.signal(signal.SIGINT, before)
