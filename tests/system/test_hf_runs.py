"""A model of Hugging Face's goes through the real commands: imported, trained one step, exported, opened again."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.errors import UserError
from conf.schema import load
from data_pipeline.config import OrderConfig
from data_pipeline.manifest import TOKENIZER, read_manifest, write_manifest
from data_pipeline.order.lookup import order
from data_pipeline.tokenizer.tokenizer import train_bpe
from tests.helpers.hf_models import SIZE, hf_model, save
from tests.helpers.ranks import ROOT
from tests.system import runs
from tests.system.runs import make_data
from tests.system.test_order_of_a_run import documents_of
from trainer.check import same_vocabulary
from trainer.config.hf import ImportHfConfig
from trainer.config.model import Norm
from trainer.config.pretrain import PretrainConfig
from trainer.import_hf import import_hf
from trainer.pretrain import pretrain as check
from trainer.run.journal import read_journal

VOCAB = SIZE["vocab_size"]
TINY = (*runs.TINY, f"model.vocab_size={VOCAB}")
STEADY = "optim.eps=1e-4"  # Adam's first step is the gradient's sign where eps is far below it, and a sign of noise


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vocabulary of its own instead of the stand-in that `make_data` writes."""
    root = make_data(tmp_path_factory.mktemp("data"), VOCAB)
    vocabulary = train_bpe(list(pydoc_data.topics.topics.values())[:15], VOCAB)
    for split in ("train", "val"):
        manifest = read_manifest(root / split)
        (root / split / TOKENIZER).unlink()
        vocabulary.save(root / split)
        write_manifest(replace(manifest, tokenizer_sha256=vocabulary.sha256, eot_id=vocabulary.eot_id))
    return root


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= 1e-5 * scale, f"{what}: max|a-b| = {error:.3g} against max|b| = {scale:.3g}"


def windows_of_first_step(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Tensor:
    """[8, 65] tokens, from the tars alone."""
    capsys.readouterr()
    order(load(OrderConfig, [f"checkpoint={run}", "steps=0", "json=true"]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    documents = documents_of(data / "train")
    rows = [np.concatenate([documents[name][start:end] for name, start, end in line["spans"]]) for line in lines]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def plain_step(model: Any, tokens: Tensor, cfg: Any) -> tuple[float, float]:
    """One step in plain torch: (loss, gradient norm); changes the model."""
    loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps).step()
    return loss.item(), norm.item()


@pytest.mark.slow
@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_an_imported_model_trains_as_in_torch_and_is_exported(
    norm: Norm, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step from it is plain torch's, and transformers opens its export."""
    seed = torch.seed()
    model = hf_model(norm)
    import_hf(ImportHfConfig(str(save(model, tmp_path / "theirs")), str(tmp_path / "start")))
    given = [f"data.path={data}", f"model.vocab_size={VOCAB}", f"model.norm={norm.value}", "max_steps=1", STEADY]
    runs.pretrain(tmp_path / "run", *given, f"init_from={tmp_path / 'start'}")

    cfg = load(PretrainConfig, [*TINY, *given, f"run.dir={tmp_path / 'run'}"])
    tokens = windows_of_first_step(tmp_path / "run", data, capsys)
    loss, grad_norm = plain_step(model, tokens, cfg)
    (row,) = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert row.metrics["train/loss"] == pytest.approx(loss, rel=1e-5), f"seed={seed}"
    assert row.metrics["optim/grad_norm"] == pytest.approx(grad_norm, rel=1e-5), f"seed={seed}"
    assert row.metrics["optim/lr"] == cfg.optim.lr

    argv = ["-m", "trainer.export_hf", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'ours'}"]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "AutoTokenizer gives the same tokens" in done.stdout, done.stderr
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    theirs = dict(model.named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.detach(), theirs[name].detach(), f"{name}, seed={seed}")
    with torch.no_grad():
        assert_close(ours(tokens[:, 1:]).logits, model(tokens[:, 1:]).logits, f"logits, seed={seed}")


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_read_where_it_started_again(data: Path, tmp_path: Path) -> None:
    import_hf(ImportHfConfig(str(save(hf_model(Norm.pre), tmp_path / "theirs")), str(tmp_path / "start")))
    given = (f"data.path={data}", f"model.vocab_size={VOCAB}", f"init_from={tmp_path / 'start'}")
    runs.pretrain(tmp_path / "run", *given, "max_steps=1")
    (tmp_path / "start").rename(tmp_path / "gone")
    runs.pretrain(tmp_path / "run", *given, "max_steps=2")
    assert [row.step for row in read_journal(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing there": (["init_from=nowhere"], "init_from=nowhere is neither a checkpoint nor a run folder that holds"),
    "another shape": (["model.n_layer=3"], "model.n_layer=2 (here 3): give its model=, or another init_from"),
    "a shorter context": (["model.n_ctx=32", "tokens_per_step=256"], "model.n_ctx=64 (here 32)"),
    "another norm": (["model.norm=post"], "model.norm=pre (here post)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_start_that_cannot_be_is_refused_before_any_work(what: str, data: Path, tmp_path: Path) -> None:
    overrides, line = REFUSED[what]
    import_hf(ImportHfConfig(str(save(hf_model(Norm.pre), tmp_path / "theirs")), str(tmp_path / "start")))
    given = [f"data.path={data}", "max_steps=2", f"run.dir={tmp_path / 'run'}", f"init_from={tmp_path / 'start'}"]
    with pytest.raises(UserError) as caught:
        check(load(PretrainConfig, [*TINY, *given, *overrides]))
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_start_with_another_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    """The same vocabulary in another form is accepted."""
    theirs = save(hf_model(Norm.pre), tmp_path / "theirs")
    body = json.loads((data / "train" / "tokenizer.json").read_text())
    body["model"]["merges"] = [" ".join(pair) for pair in body["model"]["merges"]]  # as files of 2020 have them
    del body["pre_tokenizer"]["use_regex"]
    (theirs / "tokenizer.json").write_text(json.dumps(body, indent=1))
    import_hf(ImportHfConfig(str(theirs), str(tmp_path / "same")))
    assert same_vocabulary(tmp_path / "same" / "tokenizer.json", data / "train" / "tokenizer.json")

    body["model"]["merges"] = body["model"]["merges"][1:] + body["model"]["merges"][:1]
    (theirs / "tokenizer.json").write_text(json.dumps(body))
    import_hf(ImportHfConfig(str(theirs), str(tmp_path / "other")))
    given = [f"data.path={data}", "max_steps=2", f"run.dir={tmp_path / 'run'}", f"init_from={tmp_path / 'other'}"]
    with pytest.raises(UserError, match=r"tokenizer\.json is another vocabulary than the data's .* tokenizer="):
        check(load(PretrainConfig, [*TINY, *given]))
