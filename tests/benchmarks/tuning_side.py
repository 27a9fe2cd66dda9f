"""Our side of tests/benchmarks/trl.py: a tuning by its own entry, which makes its steps in turns.

    python -m tests.benchmarks.tuning_side KIND PLAN SETTINGS... ADDRESS

KIND is sft, reward or dpo, SETTINGS are those of its entry. Before the first step it writes the examples and those of
each step, in the order of the run, to the file PLAN.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from conf.schema import load
from data_pipeline.files import publish
from tests.benchmarks.turns import Pace

TASKS = {"sft": "answers", "reward": "ranking", "dpo": "preferences"}  # the function that makes each entry's task
STEPS = 200  # of which the plan tells


def main(kind: str, plan: str, *rest: str) -> None:
    *words, address = rest
    entry = importlib.import_module(f"trainer.{kind}")
    make_task = getattr(entry, TASKS[kind])

    def told(checked: Any, *more: Any) -> Any:
        publish(Path(plan), json.dumps(planned(kind, checked)).encode())  # whole at once: the other side waits for it
        hold(address)
        return make_task(checked, *more)

    setattr(entry, TASKS[kind], told)
    tune = getattr(entry, kind)
    tune(load(get_type_hints(tune)["cfg"], words))


def hold(address: str) -> None:
    """Make the feed wait for its turn before each step."""
    from trainer.data.example_feed import ExampleFeed

    pace, feed = Pace(address), ExampleFeed.next

    def paced(self: ExampleFeed) -> Any:
        pace.step()
        return feed(self)

    ExampleFeed.next = paced  # type: ignore[method-assign]


def planned(kind: str, checked: Any) -> dict[str, Any]:
    """The examples as ids, the numbers of those of each step, and the first weights of a reward's head."""
    size, order = checked.cfg.batch_size, checked.order
    steps = [[i for p in range(s * size, (s + 1) * size) for i in order.members(p)] for s in range(STEPS)]
    examples = [EXAMPLE[kind](item) for item in checked.train]
    return {"steps": steps, "examples": examples, "head": head(checked.cfg) if kind == "reward" else None}


def head(cfg: Any) -> list[list[float]]:
    """The weights that `trainer.reward` starts its head with."""
    import math

    from trainer.distributed.mesh import single_rank_mesh
    from trainer.distributed.world import read_world
    from trainer.model.init import initialise
    from trainer.objective.heads import WithHead

    model = WithHead(cfg.model, single_rank_mesh(read_world()), n_out=1, std=1 / math.sqrt(cfg.model.n_embd + 1))
    initialise(model, cfg.model, cfg.seed)
    weights: list[list[float]] = model.head.weight.tolist()
    return weights


def conversation(item: Any) -> dict[str, list[int]]:
    return {"ids": item.ids.tolist(), "mask": item.mask.astype(int).tolist()}


def comparison(item: Any) -> dict[str, list[int]]:
    better, worse = item.ranks.argsort().tolist()
    return {name: item.answers[i].tolist() for name, i in (("chosen", better), ("rejected", worse))} | {
        "prompt": item.prompt.tolist()
    }


def pair(item: Any) -> dict[str, list[int]]:
    return {name: getattr(item, name).tolist() for name in ("prompt", "chosen", "rejected")}


EXAMPLE = {"sft": conversation, "reward": comparison, "dpo": pair}

if __name__ == "__main__":
    main(*sys.argv[1:])
