"""CORE: predictions and centred figures against nanochat's core_eval, written anew in plain torch over transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.evaluation_data import WORDS, Documents, Row, random_checkpoint, write_rows
from tests.helpers.seeds import seeded
from trainer.config.inference import EvaluateConfig
from trainer.evaluate import evaluate
from trainer.evaluation.evaluation import plan_task
from trainer.evaluation.tasks.find import load, load_task, load_tasks
from trainer.evaluation.tasks.groups import GroupConfig

N = 6  # documents of a task
SHOTS = {"choices": (0, 2), "questions": (1,), "schemas": (0, 1, 2), "texts": (0, 1, 2), "answers": (0,)}
FORMS = {  # of core.yaml: nanochat's kind and delimiter
    "choices": ("multiple_choice", " "),
    "questions": ("multiple_choice", "\nAnswer: "),
    "schemas": ("schema", " "),
    "texts": ("language_modeling", " "),
    "answers": ("language_modeling", "\nAnswer: "),
}
# What nanochat printed of a model of its own at step 5075: accuracy, centred.
PRINTED = {
    "hellaswag_zeroshot": (0.304023, 0.072031),
    "jeopardy": (0.009920, 0.009920),
    "bigbench_qa_wikidata": (0.320407, 0.320407),
    "arc_easy": (0.510522, 0.347363),
    "arc_challenge": (0.258532, 0.011377),
    "copa": (0.600000, 0.200000),
    "commonsense_qa": (0.285012, 0.106265),
    "piqa": (0.620239, 0.240479),
    "openbook_qa": (0.296000, 0.061333),
    "lambada_openai": (0.252086, 0.252086),
    "hellaswag": (0.304621, 0.072827),
    "winograd": (0.553114, 0.106227),
    "winogrande": (0.516180, 0.032360),
    "bigbench_dyck_languages": (0.143000, 0.143000),
    "agi_eval_lsat_ar": (0.269565, 0.086956),
    "bigbench_cs_algorithms": (0.368939, 0.368939),
    "bigbench_operators": (0.109524, 0.109524),
    "bigbench_repeat_copy_logic": (0.000000, 0.000000),
    "squad": (0.035478, 0.035478),
    "coqa": (0.078542, 0.078542),
    "boolq": (0.542813, -0.203123),
    "bigbench_language_identification": (0.252300, 0.177448),
}
PRINTED_CORE = 0.119520


def core() -> GroupConfig:
    found = load("core")
    assert isinstance(found, GroupConfig)
    return found


def test_guessing_and_counts_are_those_of_nanochats_print() -> None:
    """Its centred figures follow from its accuracies, and these are whole numbers of our numbers of documents."""
    group = core()
    assert list(group.tasks) == list(PRINTED) and len(PRINTED) == 22
    for name, (acc, centred) in PRINTED.items():
        member = group.tasks[name]
        assert (acc - member.guessing) / (1 - member.guessing) == pytest.approx(centred, abs=4e-6), name
        assert member.documents is not None
        assert abs(acc * member.documents - round(acc * member.documents)) <= 1e-6 * member.documents, name
    assert sum(c for _, c in PRINTED.values()) / 22 == pytest.approx(PRINTED_CORE, abs=2e-6)


class Bundle:
    """Small files in the forms of the bundle's; the tasks of a group with each form of core.yaml, and 0 to 2 shots."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self._random, self._documents = folder, random.Random(seed), Documents(seed)
        make = {"multiple_choice": self._choice, "schema": self._schema, "language_modeling": self._text}
        self.rows: dict[str, list[Row]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        for form, shots in ((form, shots) for form, some in SHOTS.items() for shots in some):
            name = f"{form}_{shots}"
            self.rows[name] = [make[FORMS[form][0]]() for _ in range(N)]
            guessing = self._random.choice((0.0, 0.25, 0.5))
            self.tasks[name] = {"form": form, "file": f"{name}.jsonl", "shots": shots, "guessing": guessing}
            write_rows(folder / "eval_data" / f"{name}.jsonl", self.rows[name])
        body = json.loads(json.dumps(asdict(core())))
        self.group = folder / "small_core.yaml"
        self.group.write_text(json.dumps({**body, "folder": "eval_data", "tasks": self.tasks}), encoding="utf-8")

    def _choice(self) -> Row:
        """Options of which some begin alike, and none begins with another one: of it nanochat would score nothing."""
        first, choices = self._random.choice(("the ", "", "a guardian ")), list[str]()
        while len(choices) < self._random.choice((2, 4)):
            new = first + self._documents.text(1, 4)
            if not any(new.startswith(old) or old.startswith(new) for old in choices):
                choices.append(new)
        return {"query": self._documents.text(3, 8), "choices": choices, "gold": self._random.randrange(len(choices))}

    def _schema(self) -> Row:
        """Contexts of which some end alike."""
        last = self._random.choice(("", " angel", " the river"))
        options = [self._documents.text(3, 6) + last for _ in range(2)]
        return {
            "context_options": options,
            "continuation": self._documents.text(2, 5),
            "gold": self._random.randrange(2),
        }

    def _text(self) -> Row:
        """Half of them go on with their last word, which our model often does; blanks around them do not count."""
        word = self._random.choice([word for word in WORDS if word.isalpha()])
        other = self._random.choice((word, word, self._documents.text(1, 3)))
        return {"context": f" {self._documents.text(2, 6)} {word} ", "continuation": other}


def rendered(kind: str, delimiter: str, item: Row, option: int | None) -> str:
    """An item with one of its options, as nanochat's templates write it."""
    if kind == "multiple_choice":
        return f"{item['query']}{delimiter}{item['choices'][item['gold'] if option is None else option]}"
    if kind == "schema":
        given = item["context_options"][item["gold"] if option is None else option]
        return f"{given}{delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{delimiter}{item['continuation']}"


def alike(sequences: list[list[int]]) -> int:
    n = 0
    while n < min(map(len, sequences)) and len({some[n] for some in sequences}) == 1:
        n += 1
    return n


def right(hf: Any, encode: Callable[[str], list[int]], bos: int, form: str, item: Row, shown: list[Row]) -> bool:
    """True if the model is right by core_eval.py: one row of the batch at a time, each after the start token."""
    kind, delimiter = FORMS[form]
    before = "".join(rendered(kind, delimiter, example, None) + "\n\n" for example in shown)
    options = item.get("choices") or item.get("context_options") or [None]
    texts = [before + rendered(kind, delimiter, item, i) for i in range(len(options))]
    rows = [[bos, *encode(text)] for text in texts]
    if kind == "multiple_choice":
        first = [alike(rows)] * len(rows)
    elif kind == "schema":
        first = [len(row) - alike([some[::-1] for some in rows]) for row in rows]
    else:
        first = [1 + len(encode((before + item["context"].strip() + delimiter).strip()))]
    losses, greedy = [], []
    for row, start in zip(rows, first, strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([row])).logits[0, start - 1 : -1].double()
        target = torch.tensor(row[start:])
        losses.append(torch.nn.functional.cross_entropy(logits, target).item())
        greedy.append(bool((logits.argmax(-1) == target).all()))
    return greedy[0] if kind == "language_modeling" else losses.index(min(losses)) == item["gold"]


def test_predictions_and_figures_are_nanochats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all forms, with 0 to 2 shots: the same questions right, and centred figures within 1e-9."""
    from transformers import GPT2LMHeadModel

    seed = seeded()
    hf, checkpoint = random_checkpoint(tmp_path, 256, seed, scale=10.0)
    theirs, bundle = GPT2LMHeadModel.from_pretrained(hf).eval(), Bundle(tmp_path, seed)
    group = str(bundle.group)
    evaluate(EvaluateConfig(str(checkpoint), [group], task_data=str(tmp_path), seed=seed, batch_size=5, json=True))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]

    tokenizer = Tokenizer.load("gpt2")
    assert tokenizer.eot_id is not None
    by_kind: dict[str, set[bool]] = {}
    centred = []
    for name, task in load_tasks([group]).items():
        label = name.removeprefix(f"{group}/")
        member, rows = bundle.tasks[label], bundle.rows[label]
        plan = plan_task(name, task, str(tmp_path), shots=None, limit=None, seed=seed)
        of_text = {rendered(*FORMS[member["form"]], row, None): row for row in rows}
        assert len(of_text) == N
        expected = []
        for i, row in enumerate(rows):
            shown = plan.prompts.before(i, lambda _: True).split("\n\n")[:-1]
            assert len(shown) == member["shots"]
            examples = [of_text[text] for text in shown]
            expected.append(right(theirs, tokenizer.encode, tokenizer.eot_id, member["form"], row, examples))
        (samples,) = tmp_path.rglob(f"samples-*{label}.jsonl")
        figure = "acc" if FORMS[member["form"]][0] == "language_modeling" else "acc_per_token"
        got = [bool(json.loads(line)["right"][figure]) for line in samples.read_text().splitlines()]
        assert got == expected, (seed, label)
        by_kind.setdefault(FORMS[member["form"]][0], set()).update(expected)
        acc = sum(expected) / N
        centred.append((acc - member["guessing"]) / (1 - member["guessing"]))
        assert results[name]["centred"] == pytest.approx(centred[-1], abs=1e-9) and results[name]["n"] == N
    assert all(found == {True, False} for found in by_kind.values()), (seed, by_kind)
    assert results[group]["centred"] == pytest.approx(sum(centred) / len(centred), abs=1e-9)
    assert (results[group]["n"], results[group]["tasks"]) == (N * len(centred), len(centred))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"a": {"form": "poems", "file": "a", "guessing": 0.0}}}, "tasks.a.form=poems: give one of choices,"),
        ({"tasks": {"a": {"form": "texts", "file": "a", "guessing": 1}}}, r"guessing=1.0: give a share from 0 to less"),
        ({"tasks": {"a": {"form": "texts", "file": "a"}}}, r"tasks.a.guessing: missing"),
        ({"forms": {"a": {"figure": "f1"}}}, r"forms.a.figure='f1', not acc or acc_per_token"),
    ],
)
def test_a_wrong_group_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**json.loads(json.dumps(asdict(core()))), **change}), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_tasks([str(path)])
    assert "mine.yaml" in str(caught.value)


def test_a_task_of_a_group_has_a_name_of_its_own() -> None:
    assert (
        list(load_tasks(["core/copa", "piqa", "core"]))[:2] == ["core/copa", "piqa"] and len(load_tasks(["core"])) == 22
    )
    assert load_task("core/copa") == load_tasks(["core"])["core/copa"]
    with pytest.raises(UserError, match=r"tasks=\[core/cpa\]: no such task \(did you mean core/copa\?\)"):
        load_tasks(["core/cpa"])
    with pytest.raises(UserError, match=r"tasks=\[core\]: it is a group of 22 tasks: give one of core/hella"):
        load_task("core")


def test_a_file_of_a_group_that_is_missing_is_named(tmp_path: Path) -> None:
    how: dict[str, Any] = {"shots": None, "limit": None, "seed": 0}
    with pytest.raises(UserError, match=r"no file .*/copa.jsonl: give task_data=.*eval_bundle.zip"):
        plan_task("core/copa", load_task("core/copa"), str(tmp_path), **how)
