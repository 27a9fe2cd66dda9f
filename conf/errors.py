"""Errors that a user can act on, and the mark of a value that must be given. Imported by every package."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: every operand, and the knob to turn."""


class TransientError(UserError):
    """What may pass by itself, such as a server that does not answer: exit code 1, so that a supervisor tries again."""


MISSING: Any = "???"  # OmegaConf's mark for "must be given"; written out so that this file needs no OmegaConf
