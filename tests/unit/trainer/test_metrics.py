"""Speed, peaks and the progress line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.ranks import ROOT
from trainer.metrics import PEAK_TFLOPS, Speed, peak_flops, peak_memory_gib, progress_line


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_counts_the_window_and_not_what_is_no_step() -> None:
    clock = Clock()
    speed = Speed(flops_per_token=6e6, peak_flops=1e12, window=2, clock=clock)
    assert speed.eta_s(1000) is None
    for seconds in (9.0, 2.0, 3.0):  # the first falls out of the window
        clock.now += seconds
        speed.step(1000)
        clock.now += 50.0  # validation
        speed.start()
    assert speed.work_per_s == pytest.approx(2000 / 5)
    assert speed.mfu == pytest.approx(2000 / 5 * 6e6 / 1e12)
    assert speed.eta_s(8000) == pytest.approx(20.0)


def test_progress_line_reads_as_promised() -> None:
    metrics = {
        "train/loss": 3.41234,
        "optim/lr": 4e-3,
        "speed/tokens_per_s": 12_345,
        "speed/mfu": 0.412,
    }
    line = progress_line(100, 1500, metrics, 192.4)
    assert line == "step 100/1500  loss 3.412  lr 4.0e-03  12.3k tok/s  mfu 41%  eta 3m12s"
    assert progress_line(1, 2, {"train/loss": float("nan")}) == "step 1/2  loss nan"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599.7, "1h00m"),
        (3 * 3600 + 250, "3h04m"),
        (2 * 86400 + 3 * 3600, "2d03h"),
    ],
)
def test_time_left_is_short(seconds: float, text: str) -> None:
    assert progress_line(1, 2, {}, seconds).endswith(f"eta {text}")


@pytest.mark.parametrize(
    ("speed", "text"),
    [(7, "7"), (999.4, "999"), (1000, "1k"), (485_432, "485k"), (999_600, "1M"), (1.234e6, "1.23M")],
)
def test_tokens_a_second_are_short(speed: float, text: str) -> None:
    assert progress_line(1, 2, {"speed/tokens_per_s": speed}).endswith(f"  {text} tok/s")


def test_cpu_peak_and_memory_are_measured_in_flops_and_gib() -> None:
    import torch

    cpu = torch.device("cpu")
    assert 1e8 < peak_flops(cpu, torch.float32) < 1e15  # no computer is slower or faster
    assert 0.05 < peak_memory_gib(cpu) < 1000


def test_longer_device_names_are_looked_up_first() -> None:
    """A shorter name may be a part of a longer one."""
    names = list(PEAK_TFLOPS)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b] == []


def test_module_and_journal_import_without_torch() -> None:
    code = "import sys, trainer.metrics, trainer.run.journal, trainer.tracking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
