"""What a block changed for a while, put back also when Ctrl-C comes once more while that is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def undoing(put_back: Callable[[], None]) -> Iterator[None]:
    """Calls `put_back`, once or more, when the block ends, however it does.

    A Ctrl-C may meet every line, also of a `finally`. So its handler puts back, before it raises.
    """
    before = signal.getsignal(signal.SIGINT)
    reached = callable(before) and threading.current_thread() is threading.main_thread()  # no other thread is

    def interrupted(number: int, frame: FrameType | None) -> None:
        try:
            if callable(before):
                before(number, frame)  # Python's own raises KeyboardInterrupt; else the block goes on
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
