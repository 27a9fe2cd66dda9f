"""The best checkpoint is the best of those that were measured alike."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint.ranking import Ranking, best

OURS, THEIRS = "lm over 8 windows", "lm over 4 windows"


def test_a_change_of_what_is_measured_starts_it_anew() -> None:
    ranking = Ranking({})
    assert ranking.enter(OURS) is None and ranking.beats(3.0)
    ranking.take(3.0)
    assert ranking.enter(OURS) is None and not ranking.beats(3.0) and not ranking.beats(float("nan"))
    again = Ranking(ranking.state())
    line = again.enter(THEIRS)
    assert line is not None and OURS in line and THEIRS in line and "3.0000" in line
    assert again.beats(9.0) and not again.beats(float("inf"))


def test_a_state_of_an_older_version_goes_on() -> None:
    """It did not say what it measured: its best stays until a better one comes."""
    ranking = Ranking({"best_val_loss": 3.0})
    assert ranking.enter(OURS) is None and not ranking.beats(3.5) and ranking.beats(2.5)
    assert ranking.state() == {"best_val_loss": 3.0, "measured": OURS}


def state(loss: float | None, measured: str | None) -> dict[str, Any]:
    return {"val_loss": loss, **({"measured": measured} if measured else {})}


def test_the_best_is_of_the_newest_measure() -> None:
    saved = [state(3.0, None), state(1.0, OURS), state(0.5, THEIRS), state(2.0, OURS), state(2.5, OURS)]
    named = [(str(i), each) for i, each in enumerate(saved)]
    assert best(named) == "3", "it starts anew at each change, also back to what was measured before"
    assert best([*named, ("5", state(None, THEIRS)), ("6", state(float("nan"), THEIRS))]) == "3"
    assert best(named[:2]) == "1" and best(named[:1]) == "0" and best([]) is None
    assert best([("0", state(1.0, None)), ("1", state(1.0, OURS))]) == "0", "of equal ones the first"
