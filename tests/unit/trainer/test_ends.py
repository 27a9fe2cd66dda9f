"""The ends of a run before max_steps: of its hours and of its patience."""

from __future__ import annotations

import json
import math
import random

import pytest

from tests.helpers.seeds import seeded
from trainer.ends import Ends
from trainer.run.journal import Row, seconds_trained


def test_patience_counts_validations_without_a_new_lowest_loss() -> None:
    """Through a checkpoint after each of them, too: JSON holds all that counts."""
    draw = random.Random(seeded())
    for _ in range(50):
        losses = [draw.choice([math.nan, math.inf, draw.random(), draw.random()]) for _ in range(40)]
        patience = draw.randrange(1, 6)
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        best = [min(finite[: i + 1]) for i in range(40)]
        new = [i for i in range(40) if best[i] < min([math.inf, *finite[:i]])]
        expected = next((i for i in range(40) if i - max([-1, *(n for n in new if n <= i)]) >= patience), None)
        state: dict[str, object] = {}
        ended = None
        for i, loss in enumerate(losses):
            ends = Ends(None, patience, 0.0)
            ends.resume(state)
            assert ends.why is None
            ends.validated(loss, "lm over a")
            state = json.loads(json.dumps(ends.state(), allow_nan=False))
            if ends.why:
                ended = i
                break
        assert ended == expected, losses
        again = Ends(None, patience, 0.0)
        again.resume(state)
        assert again.why == ends.why
        more = Ends(None, patience + 1, 0.0)
        more.resume(state)
        assert more.why is None


def test_patience_begins_anew_with_what_a_loss_measures() -> None:
    ends = Ends(None, 2, 0.0)
    ends.resume({})
    for loss, measured in ((1.0, "a"), (2.0, "a"), (3.0, "b"), (4.0, "b")):
        ends.validated(loss, measured)
        assert ends.why is None
    ends.validated(3.0, "b")
    assert ends.why == (
        "eval.patience=2: val loss has not been below 3.0000 for 2 validations; a larger eval.patience goes on"
    )


@pytest.mark.parametrize(("trained_s", "over"), [(7199.0, False), (7200.0, True), (9000.0, True)])
def test_hours_of_earlier_starts_count(trained_s: float, over: bool) -> None:
    ends = Ends(2.0, 0, trained_s)
    ends.resume({})
    assert (ends.why is not None, ends.time_is_up()) == (over, over)
    if over:
        hours = f"{trained_s / 3600:.3g} hours of training in all its starts"
        assert ends.why == f"max_hours=2: {hours}; a larger max_hours goes on"


def test_the_seconds_of_starts_are_added_up() -> None:
    """Those of steps that were done again as well; not those between two starts."""
    times = [(1, 10.0), (1, 15.0), (1, 30.0), (2, 100.0), (3, 250.0), (3, 251.5)]
    assert seconds_trained(Row(step, generation, at) for step, (generation, at) in enumerate(times)) == 21.5
    assert seconds_trained([]) == 0
