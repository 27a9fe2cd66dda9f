"""What one rank could not read ends every rank, and in the same way: passing, or for good."""

from __future__ import annotations

from conf.errors import TransientError, UserError
from tests.helpers.ranks import run_ranks


def ends() -> list[str]:
    """How `agree` ends on this rank of a tensor-parallel pair whose reader, rank 0, has an error of either kind."""
    from trainer.config.parallel import ParallelConfig
    from trainer.data.feed import agree
    from trainer.distributed.mesh import join_ranks, leave_ranks
    from trainer.distributed.world import read_world

    mesh = join_ranks(read_world(), ParallelConfig(name="tp2", tp=2))
    found = []
    for kind in (TransientError, UserError):
        mine = kind("no answer") if mesh.tp_rank == 0 else UserError("no answer")  # the channel carries the text alone
        try:
            agree(mesh, mine)
        except UserError as e:
            found.append(f"{type(e).__name__}: {e}")
    leave_ranks(mesh)
    return found


def test_a_transient_error_of_a_reader_is_its_groups() -> None:
    """So that the supervisor tries again."""
    assert (
        run_ranks(2, "tests.distributed.trainer.data.test_agree:ends")
        == [["TransientError: no answer", "UserError: no answer"]] * 2
    )
