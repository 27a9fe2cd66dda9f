"""Gains of a trained model over the frequencies of words: LAMBADA's last words and BLiMP's pairs, one by one.

    python -m tests.benchmarks.trained_model checkpoint=RUN data=SHARDS lambada=LAMBADA_TEST.jsonl blimp=FOLDER
        [precision=fp32] [batch_size=16] [seed=0]

Beside the checkpoint stand the same model untrained (drawn from `seed`), and the unigram of the training shards: each
token by its frequency there, one added to each count. Prints one JSON line, in `rows` for each task:
    model, untrained, unigram   the mean log-probability of a word in nats; of BLiMP the accuracy, a tie counts one half
    beyond                      for both others: the mean of the paired differences, its standard error, and their ratio
There is a row for each file of BLiMP, too.
"""

from __future__ import annotations

import json
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from tests.benchmarks import machine
from trainer.config.inference import Number
from trainer.distributed.mesh import single_rank_mesh
from trainer.distributed.world import read_world
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.subject import Subject
from trainer.inference.requests import Pair
from trainer.inference.scorer import score
from trainer.model.arithmetic import param_count
from trainer.model.gpt import GPT
from trainer.model.init import initialise

DEFAULTS: dict[str, Any] = {
    "checkpoint": "",
    "data": "",
    "lambada": "",
    "blimp": "",
    "precision": "fp32",
    "batch_size": 16,
    "seed": 0,
}


def words(path: Path, encoder: Encoder) -> list[Pair]:
    """The last word of each passage after the others."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [encoder.pair(before, f" {word}") for before, word in (text.rsplit(" ", 1) for text in texts)]


def sentences(path: Path, encoder: Encoder) -> list[Pair]:
    """The good and the bad sentence of each pair, one after the other."""
    pairs = map(json.loads, path.read_text("utf-8").splitlines())
    return [encoder.pair("", pair[f"sentence_{kind}"]) for pair in pairs for kind in ("good", "bad")]


def unigram(shards: Path, vocab_size: int) -> np.ndarray:
    """The log-probability of each token."""
    counts = np.ones(vocab_size)
    for path in sorted((shards / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy") and (file := tar.extractfile(member)):
                    counts += np.bincount(np.load(BytesIO(file.read())), minlength=vocab_size)
    return np.log(counts / counts.sum())


def judged(log_p: list[float]) -> list[float]:
    """For each pair 1 if the good sentence is likelier, one half for a tie."""
    return [0.5 * ((good > bad) + (good >= bad)) for good, bad in zip(log_p[::2], log_p[1::2], strict=True)]


def beyond(ours: list[float], other: list[float]) -> dict[str, float]:
    differences = [a - b for a, b in zip(ours, other, strict=True)]
    mean, stderr = fmean(differences), stdev(differences) / len(differences) ** 0.5
    return {"mean": round(mean, 4), "stderr": round(stderr, 4), "ratio": round(mean / stderr, 1)}


def row(task: str, found: dict[str, list[float]]) -> dict[str, Any]:
    means = {name: round(fmean(values), 4) for name, values in found.items()}
    others = {name: beyond(found["model"], found[name]) for name in ("untrained", "unigram")}
    return {"task": task, "n": len(found["model"]), **means, "beyond": others}


def main(args: list[str]) -> None:
    given = dict(arg.partition("=")[::2] for arg in args)
    if set(given) - set(DEFAULTS) or not {"checkpoint", "data", "lambada", "blimp"} <= set(given):
        raise SystemExit(f"error: give checkpoint=, data=, lambada=, blimp=; settings are {'=, '.join(DEFAULTS)}=")
    settings = {key: type(value)(given.get(key, value)) for key, value in DEFAULTS.items()}
    subject, mesh = (
        Subject.find(settings["checkpoint"], None, Number[settings["precision"]]),
        single_rank_mesh(read_world()),
    )
    model, untrained = subject.on(mesh), GPT(subject.cfg, mesh).eval()
    initialise(untrained, subject.cfg, settings["seed"])
    encoder, frequencies = Encoder(subject.tokenizer), unigram(Path(settings["data"]), subject.cfg.vocab_size)

    def ask(pairs: list[Pair]) -> dict[str, list[float]]:
        found = {
            name: [float(s.log_p.double().sum()) for s in score(each, pairs, batch_size=settings["batch_size"])]
            for name, each in (("model", model), ("untrained", untrained))
        }
        return found | {"unigram": [float(frequencies[ids].sum()) for _, ids in pairs]}

    files = sorted(Path(settings["blimp"]).glob("*.jsonl"))
    blimp = {path.stem: {k: judged(v) for k, v in ask(sentences(path, encoder)).items()} for path in files}
    whole = {name: [x for found in blimp.values() for x in found[name]] for name in ("model", "untrained", "unigram")}
    tasks = {"LAMBADA": ask(words(Path(settings["lambada"]), encoder)), "BLiMP": whole, **blimp}
    rows = [row(task, found) for task, found in tasks.items()]
    named = {
        "parameters": param_count(subject.cfg),
        "step": json.loads((subject.checkpoint / "state.json").read_text())["step"],
    }
    about = {"hardware": machine.hardware(), "versions": machine.versions("torch")}
    print(json.dumps({"benchmark": "trained_model", **named, "seed": settings["seed"], "rows": rows, **about}))


if __name__ == "__main__":
    main(sys.argv[1:])
