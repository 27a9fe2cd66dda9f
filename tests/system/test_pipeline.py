"""From a folder of texts to a sample, by the commands that the README shows."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.generate
from conf.schema import load
from tests.helpers.ranks import ROOT, free_port
from tests.system.runs import pretrain
from trainer.config.inference import GenerateConfig
from trainer.run.folder import RunFolder

VOCAB = 512


def command(module: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", module, *args]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, input=stdin, check=False)


def done(module: str, *args: str, stdin: str = "") -> str:
    ended = command(module, *args, stdin=stdin)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts -> vocabulary -> shards -> a few steps on two tensor-parallel ranks: the run's folder."""
    home = tmp_path_factory.mktemp("home")
    texts = home / "texts"
    texts.mkdir()
    for name, text in sorted(pydoc_data.topics.topics.items())[:40]:
        (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    corpus = ("corpus=text", f"corpus.path={texts}")
    done("data_pipeline.bpe", "train", *corpus, f"vocab_size={VOCAB}", f"output={home / 'vocabulary'}")
    sizes = ("val_fraction=0.2", "shard_tokens=20000", "block_tokens=4096")
    shards = (f"tokenizer={home / 'vocabulary'}", f"output={home / 'data'}", *sizes)
    done("data_pipeline.shards", "write", *corpus, *shards)
    assert "ok" in done("data_pipeline.shards", "verify", f"path={home / 'data'}")
    data = (f"data.path={home / 'data'}", f"model.vocab_size={VOCAB}")
    pretrain(home / "run", *data, "parallel=tp2", "max_steps=30", "tokens_per_step=1024", ranks=2)
    return home / "run"


def generate(run: Path, *args: str, stdin: str = "") -> dict[str, Any]:
    return json.loads(done("trainer.generate", f"checkpoint={run}", "json=true", *args, stdin=stdin))


def generated(capsys: pytest.CaptureFixture[str], run: Path, *args: str) -> tuple[str, str]:
    """Standard output and error of the command, in this process."""
    capsys.readouterr()
    trainer.generate.generate(load(GenerateConfig, [f"checkpoint={run}", *args]))
    out, err = capsys.readouterr()
    return out, err


def test_greedy_on_one_rank_from_two_equals_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [[5, 80, 300], [7], [9, 9, 400]]
    ours = generate(run, f"prompt_ids={json.dumps(prompts)}", "temperature=0", "max_new_tokens=40")["ids"]
    model = AutoModelForCausalLM.from_pretrained(RunFolder(run).latest())
    assert model.config.eos_token_id == VOCAB - 1, "where transformers stops by itself too"
    for prompt, ids in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=VOCAB - 1, pad_token_id=0
            )
        assert ids == theirs[0].tolist()


def test_a_seed_gives_the_same_text_and_another_seed_another(run: Path) -> None:
    args = ("prompt_file=-", "max_new_tokens=20", "top_k=50", "top_p=0.95")
    first = generate(run, *args, "seed=1", stdin="The class\nA statement is\n")
    assert first == generate(run, *args, "seed=1", stdin="The class\nA statement is\n")
    assert first != generate(run, *args, "seed=2", stdin="The class\nA statement is\n")
    assert [t.startswith(p) for t, p in zip(first["text"], ("The class", "A statement is"), strict=True)] == [
        True,
        True,
    ]


def test_samples_from_the_start_of_a_text_beyond_n_ctx(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty prompt is the end-of-text token, which the flag also makes of its text; more samples change no other."""
    out, err = generated(capsys, run, "max_new_tokens=70", "json=true", "seed=3", "prompt=", "num_samples=3")
    assert "n_ctx=64: its later tokens see the last 64 alone" in err
    some = json.loads(out)
    assert len(some["ids"]) == 3 and len({tuple(ids) for ids in some["ids"]}) == 3
    assert all(ids[0] == VOCAB - 1 for ids in some["ids"])
    assert not any(text.startswith("<|endoftext|>") for text in some["text"])
    assert any(len(ids) == 71 for ids in some["ids"])
    special = ("max_new_tokens=70", "json=true", "seed=3", "prompt=<|endoftext|>")
    out, err = generated(capsys, run, *special, "special_tokens=true")
    assert json.loads(out)["ids"] == some["ids"][:1] and "taken as letters" not in err
    assert "taken as letters: special_tokens=true" in generated(capsys, run, *special)[1]


def test_streamed_samples_are_those_printed_at_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("prompt=The class", "num_samples=2", "max_new_tokens=30", "temperature=2")
    whole, _ = generated(capsys, run, *args)
    assert whole.count("\n---\n") == 1
    assert generated(capsys, run, *args, "stream=true")[0] == whole
    stop = whole[len("The class") + 9 : len("The class") + 11]
    ended = json.loads(generated(capsys, run, *args, f"stop={json.dumps([stop])}", "json=true")[0])
    assert ended["text"][0] == whole[: whole.index(stop, len("The class"))]
    assert len(ended["ids"][0]) < 30


def test_a_wrong_prompt_is_refused_in_one_line(run: Path) -> None:
    """A window that does not fit, an id outside the vocabulary, no file."""
    for args, message in {
        ("prompt_ids=[[1,2,3]]", "slide=65"): "n_ctx=64",
        ("prompt_ids=[[1,512]]", "max_new_tokens=1"): "token id 512",
        ("prompt_file=nowhere.txt", "max_new_tokens=1"): "nowhere.txt",
    }.items():
        ended = command("trainer.generate", f"checkpoint={run}", *args)
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer.pretrain"],
        [
            *("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--no_local_rank", f"--master_port={free_port()}"),
            *("--module", "trainer.pretrain"),
        ],
        ["-m", "trainer.pretrain"],
    ],
    ids=["torchrun", "deepspeed", "alone"],
)
def test_every_launcher_trains_the_same_run(run: Path, tmp_path: Path, launcher: list[str]) -> None:
    from tests.system.runs import TINY
    from trainer.run.journal import read_journal

    args = [*TINY, f"run.dir={tmp_path / 'run'}", f"data.path={run.parent / 'data'}", f"model.vocab_size={VOCAB}"]
    ended = subprocess.run(
        [sys.executable, *launcher, *args, "max_steps=5"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses = [row.metrics["train/loss"] for row in read_journal(tmp_path / "run" / "metrics.jsonl")]
    whole = tmp_path / "whole"
    pretrain(whole, *args[-2:], "max_steps=5", ranks=1)
    expected = [row.metrics["train/loss"] for row in read_journal(whole / "metrics.jsonl")]
    assert losses == pytest.approx(expected, rel=1e-5)
