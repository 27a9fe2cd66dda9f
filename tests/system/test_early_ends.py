"""Runs that end themselves before max_steps: with a checkpoint, and for good until they are asked for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.status.report import gather
from tests.system.mixtures import in_turn
from tests.system.runs import make_data
from tests.system.test_resume import story, weights
from trainer.run.folder import RunFolder, step_of

RUINED = ("optim.lr=3.0", "optim.schedule.kind=constant", "eval.every=1", "eval.windows=2", "tokens_per_step=256")
PATIENCE = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Their folder, and what each start printed."""
    root = tmp_path_factory.mktemp("ends")
    data = f"data.path={make_data(root / 'data')}"
    given = [
        ("whole", "max_steps=40", f"eval.patience={PATIENCE}"),
        ("resumed", "max_steps=4"),
        ("resumed", "max_steps=40", f"eval.patience={PATIENCE}"),
        ("resumed", "max_steps=40", f"eval.patience={PATIENCE}"),
        ("hours", "max_steps=4", "max_hours=1e-9"),
        ("hours", "max_steps=4", "max_hours=1e-9"),
        ("hours", "max_steps=4", "max_hours=100"),
    ]
    said = in_turn([(root / run, [data, *RUINED, *how]) for run, *how in given], ranks=2)
    return root, said[0]


@pytest.mark.slow
def test_patience_ends_a_run_and_is_exact_after_a_resume(runs: tuple[Path, list[str]]) -> None:
    root, said = runs
    rows = dict(story(root / "whole"))
    losses = {step: row["val/loss"] for step, row in rows.items()}
    best = min(losses, key=lambda step: losses[step])
    last = max(rows)
    lowest = [min(losses[k] for k in range(1, step + 1)) for step in range(1, last + 1)]
    repeated = [step for step in range(PATIENCE, last) if lowest[step] == lowest[step - PATIENCE]]
    assert last < 40 and last - best == PATIENCE and repeated == [last - 1], losses
    assert story(root / "resumed") == story(root / "whole")
    assert weights(root / "resumed") == weights(root / "whole") != {}
    why = f"eval.patience=3: val loss has not been below {losses[best]:.4f} for 3 validations; a larger eval.patience"
    for run, text in (("whole", said[0]), ("resumed", said[2]), ("resumed", said[3])):
        assert f"step {last}/40  the run ends: {why} goes on\n" in text
        assert gather(root / run, 1.0)["state"] == {
            "state": "ended",
            "why": f"by itself, with the checkpoint of step {last} of 40: {why} goes on",
        }
    assert "loss" not in said[3].split("goes on from step-")[1].split("the run ends")[0], "it trained on"


@pytest.mark.slow
def test_max_hours_end_a_run_until_there_are_more(runs: tuple[Path, list[str]]) -> None:
    """The hours of the second start are those of the first, by the journal: it trains no step."""
    root, said = runs
    assert "step 1/4  the run ends: max_hours=1e-09: " in said[4] and "step 1/4  the run ends: " in said[5]
    assert "step 2/4" not in said[4] + said[5]
    folder = RunFolder(root / "hours")
    assert step_of(folder.published()[-1]) == 4 and folder.ended() is None
    assert [folder.facts(number)["from"] for number in (2, 3)] == ["step-00000001.gen-0001"] * 2
    assert "ended" in folder.facts(1) and "ended" in folder.facts(2)
    assert story(root / "hours") == story(root / "whole")[:4]
