"""TRL's side of tests/benchmarks/trl.py, for the interpreter of TRL's environment: none of our packages is imported.

    python -m tests.benchmarks.trl_side SETTINGS ADDRESS

SETTINGS is a JSON file: `kind`, the `folder` of the model, the `plan` that our side wrote, `arguments` of TRL's config,
and `ordered`: each step's batch is the plan's, else TRL's own sampler draws. Examples are token ids already.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import machine
from tests.benchmarks.turns import Pace

IGNORE = -100  # a label that does not count
PACKAGES = ("trl", "transformers", "accelerate", "torch", "datasets")


def main(path: str, address: str) -> None:
    import torch
    import trl
    from transformers import TrainerCallback
    from transformers.utils.logging import set_verbosity_error

    given = json.loads(Path(path).read_text())
    vars(trl.SFTTrainer), vars(trl.RewardTrainer), vars(trl.DPOTrainer)  # imported while our side starts
    while not (file := Path(given["plan"])).is_file():
        time.sleep(0.2)
    plan = json.loads(file.read_text())
    set_verbosity_error()
    pace = Pace(address)
    losses: list[float] = []
    tokens = [0]

    class Turns(TrainerCallback):
        """Waits before the first step and behind each."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pace.report |= {"versions": machine.versions(*PACKAGES), "threads": torch.get_num_threads()}
            pace.step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.report |= {"losses": losses[:], "tokens": tokens[0]}
            pace.step()

    class Observed:
        """Mixed into a trainer: keeps each step's loss, which the log rounds, and counts tokens."""

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            tokens[0] += int(inputs["attention_mask"].sum())
            parent: Any = super()
            loss = parent.training_step(model, inputs, *rest)
            losses.append(float(loss))
            return loss

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # of ids

    class Ordered(Observed):
        def get_train_dataloader(self) -> Any:
            trainer: Any = self
            dataset = trainer._remove_unused_columns(trainer.train_dataset, description="training")
            loader = torch.utils.data.DataLoader(dataset, batch_sampler=plan["steps"], collate_fn=trainer.data_collator)
            return trainer.accelerator.prepare(loader)

    trainer = build(given, plan, Ordered if given["ordered"] else Observed)
    trainer.add_callback(Turns())
    trainer.train()


def build(given: dict[str, Any], plan: dict[str, Any], mixin: type) -> Any:
    """TRL's trainer of a kind, on the exported model."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}[given["kind"]]
    config = getattr(trl, f"{name}Config")(**given["arguments"])
    tokenizer = AutoTokenizer.from_pretrained(given["folder"])
    tokenizer.pad_token = tokenizer.eos_token
    if given["kind"] == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(
            given["folder"], num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
        )
        with torch.no_grad():
            model.score.weight.copy_(torch.tensor(plan["head"]))
    else:
        model = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float32)
    rows = [ROWS[given["kind"]](example) for example in plan["examples"]]
    kind: Any = type(f"Observed{name}Trainer", (mixin, getattr(trl, f"{name}Trainer")), {})
    return kind(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def conversation(example: dict[str, list[int]]) -> dict[str, list[int]]:
    labels = [i if learnt else IGNORE for i, learnt in zip(example["ids"], example["mask"], strict=True)]
    return {"input_ids": example["ids"], "labels": labels}


def whole(example: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"{name}_ids": example["prompt"] + example[name] for name in ("chosen", "rejected")}


def parts(example: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"{name}_ids": example[name] for name in ("prompt", "chosen", "rejected")}


ROWS = {"sft": conversation, "reward": whole, "dpo": parts}

if __name__ == "__main__":
    main(*sys.argv[1:])
