"""Work that all ranks do together, and errors that all ranks learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from conf.errors import TransientError, UserError, may_pass

T = TypeVar("T")


def all_ranks(what: str, function: Callable[[], T]) -> list[T]:
    """`function` on every rank, and what it returned on each; an error on any rank is a UserError on all.

    It is TransientError where each rank's error is.
    """
    result, mine, message = None, None, None
    try:
        result = function()
    except Exception as e:
        mine, message = e, str(e) if isinstance(e, (UserError, OSError)) else repr(e)
    answer = (message, mine is not None and may_pass(mine), result)
    answers: list[Any] = [answer]
    if dist.is_initialized():  # else this process is alone
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
    if mine is not None and not isinstance(mine, (UserError, OSError)):
        raise mine  # a defect of the program keeps its traceback
    failed = next((f"{m} (rank {rank})" for rank, (m, *_) in enumerate(answers) if m is not None), None)
    if failed:
        kind = TransientError if all(passing for m, passing, _ in answers if m is not None) else UserError
        raise kind(f"{what}: {failed}") from mine
    return [r for *_, r in answers]
