"""Ending in order when Ctrl-C or SIGTERM asks for it."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[list[int]]:
    """Yield a list to which Ctrl-C and SIGTERM append their signal numbers, instead of ending the program at once.

    A second signal raises KeyboardInterrupt.
    """
    caught: list[int] = []

    def catch(signum: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        for signum, handler in previous.items():
            if handler is not signal.SIG_IGN:  # a program under nohup or & is not to be stopped
                signal.signal(signum, catch)
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
