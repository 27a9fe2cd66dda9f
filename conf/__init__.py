"""The values of every command as YAML in groups, and the code that composes them into checked dataclasses.

In: a dataclass and the words of a command line. Out: the dataclass, filled and checked, or an error of one line.
Start with `schema.py`; `frozen.py` writes a config to a file and reads it back.
"""

import sys
from types import TracebackType


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print nothing for a ^C, also while a command still imports what it needs."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _quiet_interrupt
