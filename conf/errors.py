"""Errors that a user can act on, and the mark of a required value. Every package imports this module."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: every operand, and the key to change."""


class TransientError(UserError):
    """A failure that may go away: server down, disk full. Exit code 1: the supervisor tries again."""


MISSING: Any = "???"  # OmegaConf's mark for "must be given"; written out so that this file needs no OmegaConf
