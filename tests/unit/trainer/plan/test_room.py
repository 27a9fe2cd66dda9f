"""The plan's answer to a rank: what its tensors need, what its machine has, and which settings would fit."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from conf.errors import UserError, out_of_memory
from conf.schema import load, run
from trainer.config.inference import GenerateConfig
from trainer.config.pretrain import PretrainConfig
from trainer.plan.layout import Layout
from trainer.plan.memory import tensor_memory
from trainer.plan.room import check_room
from trainer.plan.workload import Workload

GIB = 2**30


def config(*more: str) -> PretrainConfig:
    given = ("experiment=demo", "model=gpt2_xl", "data.path=none", "run.dir=none", "precision=bf16")
    cfg: PretrainConfig = load(PretrainConfig, [*given, "tokens_per_step=524288", *more])
    return cfg


def ask(room_gib: float | None, ranks: int, *more: str) -> None:
    cfg = config(*more)
    layout = Layout.of(cfg.parallel, int(cfg.micro_batch_size), ranks)
    check_room(Workload.of(cfg), layout, None if room_gib is None else int(room_gib * GIB), ranks)


@pytest.mark.parametrize(
    ("layout", "ranks", "room_gib", "cure"),
    [
        ("micro_batch_size=4", 1, 32, "micro_batch_size=1"),
        ("micro_batch_size=4", 1, 20, "more ranks or a smaller model"),
        ("micro_batch_size=1", 4, 15, "parallel.recompute=full parallel.zero_stage=3"),
    ],
)
def test_a_refusal_names_settings_that_do_fit(layout: str, ranks: int, room_gib: float, cure: str) -> None:
    with pytest.raises(UserError) as refused:
        ask(room_gib, ranks, layout)
    line = str(refused.value)
    assert f"room for {room_gib:.1f}: give {cure}; python -m launch.plan" in line, line
    need = float(re.findall(r"needs ([0-9.]+) GiB", line)[0])
    cfg = config(layout)
    own = Layout(ranks, 1, False, 1, cfg.parallel.recompute, cfg.parallel.offload, int(cfg.micro_batch_size))
    assert need == round(tensor_memory(Workload.of(cfg), own).total / GIB, 1) > room_gib
    if "=" in cure:
        ask(room_gib, ranks, *cure.split())


def test_what_fits_starts() -> None:
    ask(80, 1, "micro_batch_size=1")
    ask(None, 1, "model=test")


@pytest.mark.parametrize("library", ["torch", "numpy", "python"])
def test_a_librarys_out_of_memory_is_one_line(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = {
        "torch": lambda: torch.empty(1 << 50),
        "numpy": lambda: np.empty(1 << 50),
        "python": lambda: bytearray(1 << 60),
    }
    monkeypatch.setattr(sys, "argv", ["generate", "checkpoint=x", "prompt=y"])
    with pytest.raises(SystemExit) as ended:
        run(GenerateConfig, lambda _: taken[library]())
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: out of memory ("), lines
    assert out_of_memory(RuntimeError("size mismatch")) is None
