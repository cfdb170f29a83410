"""Imported first by each script: Ctrl-C while the other imports run, which takes seconds, ends without a traceback."""

import sys
from types import TracebackType


def print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python prints of an error that ends it: nothing where the user interrupted it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = print_error
