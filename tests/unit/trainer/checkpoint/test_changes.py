"""What a resumed run changes is said: each key, and the learning rate that follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.frozen import freeze
from conf.schema import load
from tests.system.runs import TINY
from trainer.checkpoint.changes import changed_lines, changed_values
from trainer.config.pretrain import PretrainConfig
from trainer.data.step_size import StepSize


class Steps:
    """A feed of 8 windows of 64 tokens in each step; its sizes are all that is asked."""

    def size(self, step: int) -> StepSize:
        return StepSize(8, 64, 512 * step)


def frozen(path: Path, *overrides: str) -> tuple[Path, PretrainConfig]:
    given = {text.split("=")[0] for text in overrides}
    base = [text for text in (*TINY, "max_steps=6", "run.dir=r", "data.path=d") if text.split("=")[0] not in given]
    cfg = load(PretrainConfig, [*base, *overrides])
    path.write_text(freeze(cfg))
    return path, cfg


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_a_longer_run_lifts_the_rate_and_says_so(tmp_path: Path, unit: str) -> None:
    """max_steps 6 -> 12 at step 6: from the floor of the old schedule to the middle of the new one."""
    common = (f"optim.schedule.unit={unit}", "optim.lr=1e-3", "optim.schedule.floor=0.1", "optim.schedule.warmup=0")
    then, _ = frozen(tmp_path / "then", *common, "optim.schedule.kind=linear")
    now, cfg = frozen(tmp_path / "now", *common, "optim.schedule.kind=linear", "max_steps=12", "model.dropout=0.2")
    lines = changed_lines(PretrainConfig, cfg.optim, cfg.max_steps, Steps(), 6, then, now)  # type: ignore[arg-type]
    assert lines[:2] == ["changed: max_steps 6 -> 12", "changed: model.dropout 0.0 -> 0.2"]
    assert lines[2:] == ["the learning rate of step 7 is 5.50e-04; unchanged it would be 1.00e-04"]


def test_what_does_not_change_is_not_said(tmp_path: Path) -> None:
    then, _ = frozen(tmp_path / "then")
    now, cfg = frozen(tmp_path / "now", "resume=must")
    assert changed_lines(PretrainConfig, cfg.optim, cfg.max_steps, Steps(), 3, then, now) == []  # type: ignore[arg-type]
    now, cfg = frozen(tmp_path / "now", "data.path=e", "precision=bf16")
    assert changed_values(then, now).items() >= {"data.path": "d -> e", "precision": "fp32 -> bf16"}.items()


def test_a_config_of_another_version_tells_its_keys_alone(tmp_path: Path) -> None:
    """The old rate is not known then."""
    then, _ = frozen(tmp_path / "then")
    then.write_text(then.read_text() + "gone: 1\n")
    now, cfg = frozen(tmp_path / "now", "optim.lr=1.0")
    lines = changed_lines(PretrainConfig, cfg.optim, cfg.max_steps, Steps(), 3, then, now)  # type: ignore[arg-type]
    assert [line.split()[1] for line in lines] == ["gone", "optim.lr"]
