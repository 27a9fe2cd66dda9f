"""Tokens a second and losses of our tunings beside TRL's SFT, reward and DPO trainers, on a tiny GPT-2 on a CPU.

    python -m venv trl_env
    trl_env/bin/pip install trl torch==2.13.0 transformers==5.23.0
    python -m tests.benchmarks.trl python=trl_env/bin/python [kinds=sft,reward,dpo] [modes=equal,defaults] [rounds=8]
        [seed=0]
    python -m tests.benchmarks.trl --markdown RESULT.json

TRL lies in an environment of its own, with the torch and the transformers that run here; `python` is its interpreter.
Each side is a process that trains by its own loop: ours by its entry, TRL's by its trainer. Both have `threads=1`
thread, fp32 and no dropout, and start from the same weights: a folder of Hugging Face's that `trainer.import_hf` reads
and `trainer.export_hf` writes again. They take turns: one waits between two steps while the other works. Examples are
the same token ids, made before. For each kind a pair of processes in each of two modes:

    equal     The order of examples is ours, each step has the same examples in one batch, and AdamW the same settings
              (SETTINGS). The first 20 steps are compared; `rounds` turns of each side, `steps=2` steps long, are timed.
    defaults  What each side does where nothing else is said: its batch, its padding or packing, its recomputing of
              activations. On each side fp32 is given, the length of a row, and no tracking.

Prints one JSON line, in `kinds` for each of them:
    losses                  of ours and of TRL's 20 steps; `loss_apart`: the largest difference, to be at most 1e-4
    ratio, ratio_lower_95   our tokens a second over TRL's in a round: the median, and its lower bound by the bootstrap;
                            tokens are those of the examples, without padding. The bar is 1.0
    cpu_ratio               the same of CPU seconds, on which other work on the machine has less influence
    tokens_per_s            of each side, the median
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks import machine
from tests.benchmarks.trl_inputs import QUIET, make_model, records
from tests.benchmarks.tuning_side import STEPS
from tests.benchmarks.turns import ROOT, Side

DEFAULTS: dict[str, Any] = {
    "python": "",
    "kinds": "sft,reward,dpo",
    "modes": "equal,defaults",
    "rounds": 8,
    "steps": 2,
    "examples": 2000,
    "layers": 2,
    "width": 128,
    "n_ctx": 256,
    "threads": 1,
    "seed": 0,
}
COMPARED = 20  # steps
LOSS_BAR, RATIO_BAR = 1e-4, 1.0
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "grad_clip": 1.0}
LR = {"sft": 1e-3, "reward": 1e-3, "dpo": 1e-4}
BATCH = {"sft": 8, "reward": 16, "dpo": 8}  # rows, comparisons, pairs: of a step of equal batches
OWN_STEPS = {"sft": (1, 4), "reward": (1, 4), "dpo": (1, 4)}  # of a turn by defaults, ours and TRL's: batches differ
WARMUP = 1  # turns by defaults that are not timed


def our_words(kind: str, root: Path, run: Path, equal: bool) -> list[str]:
    """The settings of our entry."""
    words = [f"init_from={root / 'base'}", f"examples.path={root / f'{kind}.jsonl'}", f"run.dir={run}", *QUIET]
    words += ["epochs=0", f"max_steps={STEPS}"]  # more than are made
    if equal:
        optim = SETTINGS | {"lr": LR[kind], "schedule.kind": "constant", "schedule.warmup": 0, "schedule.floor": 0}
        words += [f"optim.{key}={value}" for key, value in optim.items()]
        words += [f"batch_size={BATCH[kind]}", f"micro_batch_size={BATCH[kind]}"]
    return words


def their_arguments(kind: str, run: Path, n_ctx: int, equal: bool) -> dict[str, Any]:
    """The arguments of TRL's config."""
    found: dict[str, Any] = {"output_dir": str(run), "use_cpu": True, "bf16": False, "report_to": "none"}
    found |= {"max_length": n_ctx, "disable_tqdm": True, "max_steps": STEPS * 10}
    if equal:
        names = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon", "grad_clip": "max_grad_norm"}
        found |= {names.get(key, key): value for key, value in SETTINGS.items()}
        found |= {"learning_rate": LR[kind], "lr_scheduler_type": "constant", "gradient_checkpointing": False}
    return found


def tokens_of(kind: str, example: dict[str, list[int]]) -> int:
    """The tokens of an example: of a comparison those of both sequences."""
    if kind == "sft":
        return len(example["ids"])
    return 2 * len(example["prompt"]) + len(example["chosen"]) + len(example["rejected"])


def environment(threads: int) -> dict[str, str]:
    """That of both sides: the number of threads, one process, no network."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    return kept | fixed | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class Both:
    """The two sides of a kind, ready for their first turns."""

    def __init__(self, kind: str, root: Path, given: dict[str, Any], words: Sequence[str], equal: bool) -> None:
        self.kind, self.run = kind, root / f"{kind}_{'equal' if equal else 'defaults'}"
        self.run.mkdir()
        env, plan = environment(given["threads"]), self.run / "plan.json"
        command = [sys.executable, "-m", "tests.benchmarks.tuning_side", kind, str(plan)]
        self.ours = Side([*command, *words, *our_words(kind, root, self.run / "ours", equal)], env, self.run / "o.log")
        arguments = their_arguments(kind, self.run / "theirs", given["n_ctx"], equal)
        told = {"kind": kind, "folder": str(root / "hf"), "plan": str(plan), "arguments": arguments, "ordered": equal}
        (self.run / "settings.json").write_text(json.dumps(told))
        command = [given["python"], "-m", "tests.benchmarks.trl_side", str(self.run / "settings.json")]
        self.theirs = Side(command, env, self.run / "t.log")
        self.ours.ready()
        self.plan = json.loads(plan.read_text())
        self.about = self.theirs.ready()
        self._done = 0  # of our steps
        self._tokens = 0  # of TRL's

    def turn(self, side: str, steps: int) -> dict[str, Any]:
        """Make some steps on a side; returns their seconds, `cpu_s` and `tokens`; TRL's `losses` so far."""
        if side == "theirs":
            report = self.theirs.turn(steps)
            report["tokens"], self._tokens = report["tokens"] - self._tokens, report["tokens"]
            return report
        report = self.ours.turn(steps)
        of_step = self.plan["steps"][self._done : self._done + steps]
        report["tokens"] = sum(tokens_of(self.kind, self.plan["examples"][i]) for step in of_step for i in step)
        self._done += steps
        return report

    def our_losses(self) -> list[float]:
        from trainer.run.journal import read_journal

        return [row.metrics["train/loss"] for row in read_journal(self.run / "ours" / "metrics.jsonl")]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def timed(both: Both, rounds: int, steps: dict[str, int]) -> dict[str, Any]:
    """The sides in turn, `rounds` times."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in steps}
    for number in range(rounds):
        for side in sorted(steps, reverse=number % 2 == 1):
            found[side].append(both.turn(side, steps[side]))
    return summary(found)


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The ratios of `ours` to `theirs`: their medians, and the bootstrap's lower bounds."""
    rates = {
        per: {side: np.array([turn["tokens"] / turn[per] for turn in turns]) for side, turns in found.items()}
        for per in ("seconds", "cpu_s")
    }
    out: dict[str, Any] = {"tokens_per_s": {s: round(float(np.median(x)), 1) for s, x in rates["seconds"].items()}}
    for name, per in (("ratio", "seconds"), ("cpu_ratio", "cpu_s")):
        ratios = rates[per]["ours"] / rates[per]["theirs"]
        draws = np.median(np.random.default_rng(1).choice(ratios, (10_000, len(ratios))), axis=1)
        out |= {name: round(median(ratios), 3), f"{name}_lower_95": round(float(np.quantile(draws, 0.025)), 3)}
    return out | {"tokens": {side: [turn["tokens"] for turn in turns] for side, turns in found.items()}}


def equal_batches(both: Both, given: dict[str, Any]) -> dict[str, Any]:
    """Losses of the first steps, and the times of others.

    Raises:
        RuntimeError: the sides have seen other tokens.
    """
    first = {side: both.turn(side, COMPARED + 1) for side in ("ours", "theirs")}  # ours logs a step at the next one
    losses = {"ours": list(islice(both.our_losses(), COMPARED)), "theirs": first["theirs"]["losses"][:COMPARED]}
    found = timed(both, given["rounds"], {"ours": given["steps"], "theirs": given["steps"]})
    seen = found.pop("tokens")
    if seen["ours"] != seen["theirs"] or first["ours"]["tokens"] != first["theirs"]["tokens"]:
        raise RuntimeError(f"{both.kind}: the sides have trained on other tokens: {seen}")
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["theirs"], strict=True))
    return {"loss_apart": apart, "losses": losses, "equal": found}


def own_defaults(both: Both, given: dict[str, Any]) -> dict[str, Any]:
    """The times of each side's own batches; `tokens` are those of a step."""
    steps = dict(zip(("ours", "theirs"), OWN_STEPS[both.kind], strict=True))
    timed(both, WARMUP, steps)
    found = timed(both, given["rounds"], steps)
    each = {side: round(sum(tokens) / len(tokens) / steps[side]) for side, tokens in found["tokens"].items()}
    return {"defaults": found | {"tokens": each}}


MODES = {"equal": equal_batches, "defaults": own_defaults}


def measure(kind: str, root: Path, given: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """All of a kind."""
    lines = (json.dumps(record) + "\n" for record in records(kind, given["examples"], given["seed"]))
    (root / f"{kind}.jsonl").write_text("".join(lines))
    found: dict[str, Any] = {}
    for mode in given["modes"].split(","):
        both = Both(kind, root, given, words, equal=mode == "equal")
        try:
            found |= {"trl": both.about, **MODES[mode](both, given)}
        finally:
            both.close()
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    columns = ("ratio", "ratio_lower_95", "cpu_ratio", "cpu_ratio_lower_95")
    names = ("kind", "mode", "loss_apart", "ours, tokens/s", "TRL, tokens/s", *columns)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for mode in MODES:
        for kind, found in result["kinds"].items():
            if mode in found:
                rates = found[mode]["tokens_per_s"]
                cells = [f"`{kind}`", mode, f"{found['loss_apart']:.1e}" if mode == "equal" else ""]
                cells += [f"{rates[side]:,.0f}" for side in ("ours", "theirs")]
                cells += [f"{found[mode][column]:.2f}" for column in columns]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: list[str]) -> None:
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text())))
        return
    told = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(told) - set(DEFAULTS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(DEFAULTS)}=")
    given = {key: type(value)(told.get(key, value)) for key, value in DEFAULTS.items()}
    if unknown := set(given["modes"].split(",")) - set(MODES):
        raise SystemExit(f"error: modes={', '.join(unknown)}: modes are {', '.join(MODES)}")
    if not Path(given["python"]).is_file():
        raise SystemExit(f"error: python={given['python']}: give the interpreter of an environment with TRL")
    given["python"] = str(Path(given["python"]).absolute())  # the link itself: it is what tells the environment
    os.environ |= environment(given["threads"])
    loads, kinds = [machine.load()], {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            words = make_model(Path(folder), given)
        for kind in given["kinds"].split(","):
            kinds[kind] = measure(kind, Path(folder), given, words)
            loads.append(machine.load())
            print(kind, json.dumps(kinds[kind]), file=sys.stderr, flush=True)
    about = [found.pop("trl") for found in kinds.values()]
    result = {
        "benchmark": "trl",
        **{key: value for key, value in given.items() if key != "python"},
        "bars": {"loss_apart": LOSS_BAR, "ratio": RATIO_BAR},
        "kinds": kinds,
        "hardware": machine.hardware(),
        "versions": machine.versions("torch", "transformers", "deepspeed", "megatron-core"),
        "trl_versions": about[0]["versions"],
        "load": loads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
