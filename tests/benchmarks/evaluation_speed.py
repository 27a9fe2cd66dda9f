"""CPU seconds of scoring multiple choice beside lm-evaluation-harness' own `HFLM`, on the same weights and token ids.

    python -m tests.benchmarks.evaluation_speed [models=gpt2_small,4_layers] [documents=16] [rounds=3] [batch_size=16]
        [threads=1] [piqa=VALID.jsonl] [seed=0]

Both sides score the same (context, continuation) pairs, tokenised beforehand, in fp32, and take turns in each round.
`4 choices` are a document's two solutions and those of the next one. Without the file `piqa` the texts are random words
of PIQA's lengths, and `texts` says so. Prints one JSON line, in `rows` for each model and task:
    ratio    lm_eval's CPU seconds over ours, the median of `ratios`, one a round; `bar`: what it has to be
    cpu_s    of each side, medians
    apart    the largest difference of two log-likelihoods, over the largest of them; `greedy_equal`: the same answers
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from conf.frozen import thaw
from conf.schema import CONF
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.benchmarks import machine
from trainer.config.model import ModelConfig
from trainer.distributed.mesh import single_rank_mesh
from trainer.distributed.world import read_world
from trainer.hf.weights import hf_config, to_hf
from trainer.inference.requests import Pair
from trainer.inference.scorer import score
from trainer.model.gpt import GPT
from trainer.model.init import initialise

DEFAULTS: dict[str, Any] = {
    "models": "gpt2_small,4_layers",
    "documents": 16,
    "rounds": 3,
    "batch_size": 16,
    "threads": 1,
    "piqa": "none",  # a path of PIQA's valid.jsonl
    "seed": 0,
}
FOUR_LAYERS = ModelConfig(name="4_layers", n_layer=4, n_head=4, n_embd=256, n_ctx=1024, vocab_size=50257)
TASKS = {"PIQA, 0 shots": (0, 2, 1.3), "PIQA, 5 shots": (5, 2, 2.0), "4 choices, 5 shots": (5, 4, 3.0)}  # bars last
Document = tuple[str, list[str]]  # question, solutions


def documents(path: Path, n: int, seed: int) -> list[Document]:
    """More than `n`, the first of which are scored; others are shown before them."""
    if path.is_file():
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(d["goal"], [d["sol1"], d["sol2"]]) for d in found]
    draw = Random(seed)

    def words(low: int, high: int) -> str:
        letters = "etaoinshrdlu"
        return " ".join("".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(draw.randint(low, high)))

    return [(words(3, 12), [words(5, 30), words(5, 30)]) for _ in range(2 * n + 10)]


def pairs(texts: list[Document], n: int, shots: int, choices: int, seed: int) -> list[Pair]:
    """Of the first n documents; the demonstrations before each are its own draw from those after them."""
    encode, out = Tokenizer.load("gpt2").encode, []
    for i, (goal, own) in enumerate(texts[:n]):
        shown = Random(f"{seed} {i}").sample(texts[n:], shots)
        before = "".join(f"Question: {question}\nAnswer: {solutions[0]}\n\n" for question, solutions in shown)
        solutions = own if choices == 2 else own + texts[i + 1][1]
        context = f"{before}Question: {goal}\nAnswer:"
        out += [(encode(context), encode(f" {solution}")) for solution in solutions]
    return out


def harness(model: GPT, batch_size: int) -> Any:
    """lm_eval's HFLM on transformers' model with the weights of `model`."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Raw
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = {k: v for k, v in hf_config(model.cfg).items() if k not in ("model_type", "architectures")}
    theirs = GPT2LMHeadModel(GPT2Config(**config))
    state = {n: x[: model.cfg.vocab_size] if n == "wte.weight" else x for n, x in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(to_hf(state, model.cfg), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    raw = Raw.from_buffer(Tokenizer.load("gpt2").raw)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    return HFLM(pretrained=theirs, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


Answers = list[tuple[float, bool]]


def ours(model: GPT, given: list[Pair], batch_size: int) -> Answers:
    return [(float(s.log_p.sum()), bool(s.greedy.all())) for s in score(model, given, batch_size=batch_size)]


def theirs(peer: Any, given: list[Pair]) -> Answers:
    found: Answers = peer._loglikelihood_tokens([(("", ""), *pair) for pair in given], disable_tqdm=True)
    return found


def in_turns(
    ways: Mapping[str, Callable[[], Answers]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """CPU seconds of each side by round, and what it answers."""
    took: dict[str, list[float]] = {side: [] for side in ways}
    answers = {}
    for number in range(rounds):
        for side in sorted(ways, reverse=number % 2 == 1):
            began = time.process_time()
            answers[side] = ways[side]()
            took[side].append(time.process_time() - began)
    return took, answers


def measure(settings: dict[str, Any], cfg: ModelConfig, texts: list[Document]) -> list[dict[str, Any]]:
    model = GPT(cfg, single_rank_mesh(read_world()))
    initialise(model, cfg, settings["seed"])
    peer, rows = harness(model, settings["batch_size"]), []
    for name, (shots, choices, bar) in TASKS.items():
        given = pairs(texts, settings["documents"], shots, choices, settings["seed"])
        ways = {"ours": partial(ours, model, given, settings["batch_size"]), "lm_eval": partial(theirs, peer, given)}
        took, answers = in_turns(ways, settings["rounds"])
        log_p, their_log_p = (torch.tensor([x for x, _ in answers[side]]) for side in ways)
        ratios = [b / a for a, b in zip(*took.values(), strict=True)]
        rows.append(
            {
                "model": cfg.name,
                "task": name,
                "pairs": len(given),
                "tokens": sum(len(a) + len(b) for a, b in given),
                "continuation_tokens": sum(len(b) for _, b in given),
                "cpu_s": {side: round(median(seconds), 3) for side, seconds in took.items()},
                "ratio": round(median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "bar": bar,
                "apart": float((log_p - their_log_p).abs().max() / their_log_p.abs().max()),
                "greedy_equal": [best for _, best in answers["ours"]] == [best for _, best in answers["lm_eval"]],
            }
        )
    return rows


def main(args: list[str]) -> None:
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - set(DEFAULTS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(DEFAULTS)}=")
    settings = {key: type(value)(given.get(key, value)) for key, value in DEFAULTS.items()}
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings["threads"])
    before, piqa = machine.load(), Path(settings.pop("piqa"))
    texts = documents(piqa, settings["documents"], settings["seed"])
    rows = []
    for name in settings["models"].split(","):
        cfg = FOUR_LAYERS if name == FOUR_LAYERS.name else thaw(CONF / f"model/{name}.yaml", ModelConfig)
        rows += measure(settings, cfg, texts)
    result = {
        "benchmark": "evaluation_speed",
        **settings,
        "texts": "PIQA" if piqa.is_file() else "random words",
        "rows": rows,
        "hardware": machine.hardware(),
        "versions": machine.versions("torch", "lm_eval", "transformers"),
        "load": [before, machine.load()],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
