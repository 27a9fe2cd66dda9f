"""The settings of fine-tuning, and the commands that its entry documents, on the real files where they are."""

from __future__ import annotations

import re
import shlex

import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.examples.examples_config import Task
from data_pipeline.examples.labelled import read_labelled
from tests.helpers.chat import small_vocabulary
from tests.helpers.ranks import ROOT
from trainer import finetune
from trainer.config.optim import OptimConfig, ScheduleConfig, ScheduleKind
from trainer.config.tuning.finetune import FinetuneConfig

SHARED = ROOT.parent / "shared/data"
NEEDED = ("init_from=runs/a", "examples.path=a.tsv", "examples.task=similarity", "examples.texts=[a,b]")
REAL = {
    "CoLA": ("tasks/cola/in_domain_train.tsv", 8551, 2),
    "SST-2": ("tasks/classification/sst2.dev.jsonl", 872, 2),
    "RTE": ("tasks/entailment/rte.train.jsonl", 2490, 2),
    "SNLI": ("finetune/entailment/snli-cad.train.tsv", 1666, 3),
    "STS": ("finetune/similarity/sts2015-images.tsv", 750, None),
    "COPA": ("finetune/multiple_choice/copa-gmt.val.jsonl", 100, 2),
}
"""The file of a task, the number of its labelled examples, and that of their labels; None: numbers."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("freeze=13", "freeze=13: give 0 to the 12 blocks of model.n_layer"),
        ("freeze=-1", "freeze=-1: give 0 to"),
        ("freeze=1 optim=muon", "freeze=1 with optim.kind=muon: give adamw, or freeze=0"),
        ("lm_weight=-1", "lm_weight=-1.0: give a weight that is finite and not negative"),
        ("lm_weight=inf", "lm_weight=inf: give a weight"),
        ("head_dropout=1", "head_dropout=1.0: give a share below 1"),
        ("warmup_share=1.5", "warmup_share=1.5: give a share of the steps"),
    ],
)
def test_a_setting_out_of_range_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(FinetuneConfig, [*NEEDED, *words.split()])


def test_the_warm_up_is_a_share_of_the_steps() -> None:
    """A warm-up that the schedule has stays; the defaults are those of the released code."""
    cfg = load(FinetuneConfig, list(NEEDED))
    assert (cfg.lm_weight, cfg.head_dropout, cfg.batch_size, cfg.epochs, cfg.warmup_share) == (0.5, 0.1, 32, 3, 0.002)
    assert finetune.warmed_up(cfg.optim, cfg.warmup_share, 51_500).schedule.warmup == 103
    assert finetune.warmed_up(cfg.optim, 0.0, 51_500) == cfg.optim
    own = OptimConfig("mine", 1e-3, ScheduleConfig(ScheduleKind.linear, warmup=7))
    assert finetune.warmed_up(own, 0.5, 100) == own


def documented(task: str) -> list[str]:
    """The words of the command that the entry documents for a task, without its file."""
    text = re.search(rf"^    {task} +((?:.*\n)(?:     .*\n)*)", finetune.__doc__ or "", re.MULTILINE)
    assert text, task
    words = shlex.split(re.sub(r"\([^)]*\)", "", text[1]))
    return [word for word in words if word.startswith("examples.") and not word.startswith("examples.path=")]


@pytest.mark.parametrize("task", [*REAL, "Winograd"])
def test_a_documented_command_reads_the_real_file(task: str) -> None:
    cfg = load(FinetuneConfig, ["init_from=runs/a", "examples.path=a.tsv", *documented(task)]).examples
    if task == "Winograd":
        assert cfg.task is Task.choice
        return
    name, n, labels = REAL[task]
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not in ../shared")
    cfg.path = str(SHARED / name)
    found = read_labelled(cfg, small_vocabulary(), 1 << 16)
    assert len(found.items) == n
    assert labels is None or {item.label for item in found.items} == set(map(float, range(labels)))
