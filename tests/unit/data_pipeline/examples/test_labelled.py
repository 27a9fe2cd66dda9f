"""The inputs of GPT-1's tasks, and their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from data_pipeline.examples.examples_config import LabelledConfig, Task
from data_pipeline.examples.labelled import DELIMITER, EXTRACT, START, Labelled, TaskRenderer, read_labelled
from tests.helpers.chat import small_vocabulary, write_lines

VOCABULARY = small_vocabulary()
MARKS = {i: mark for mark, i in TaskRenderer(VOCABULARY).special.items()}


def shown(item: Labelled) -> tuple[list[str], float]:
    """The text of each input, with s, $ and e for start, delimiter and extract."""
    short = {START: "s", DELIMITER: "$", EXTRACT: "e"}
    texts = []
    for ids in item.sequences:
        text, held = "", list[int]()
        for i in ids.tolist():
            if i in MARKS:
                text, held = f"{text}{VOCABULARY.decode(held)}<{short[MARKS[i]]}>", []
            else:
                held.append(i)
        texts.append(text)
    return texts, item.label


def read(path: Path, n_ctx: int = 99, **how: Any) -> list[tuple[list[str], float]]:
    return [shown(item) for item in read_labelled(LabelledConfig(path=str(path), **how), VOCABULARY, n_ctx).items]


def test_a_task_makes_the_inputs_of_the_paper(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"a": "hot <|extract|>", "b": "cold", "label": True}, {"a": "x", "b": "y", "label": False}])
    classes = ["false", "true"]
    assert read(path, task=Task.classification, texts=["a"], classes=classes) == [
        (["<s>hot <|extract|><e>"], 1.0),
        (["<s>x<e>"], 0.0),
    ]
    assert read(path, task=Task.classification, texts=["a", "b"], classes=classes)[1] == (["<s>x<$>y<e>"], 0.0)
    write_lines(path, [{"a": "x", "b": "y", "score": "3.5"}])
    assert read(path, task=Task.similarity, texts=["a", "b"], label="score") == [(["<s>x<$>y<e>", "<s>y<$>x<e>"], 3.5)]
    write_lines(path, [{"story": "once", "ask": "why", "ends": ["a", "b", "c"], "label": 2}])
    assert read(path, task=Task.choice, texts=["story", "ask"], choices=["ends"]) == [
        (["<s>once why<$>a<e>", "<s>once why<$>b<e>", "<s>once why<$>c<e>"], 2.0)
    ]
    write_lines(path, [{"story": "once", "one": "a", "two": "b", "right": "2"}])
    how = {"task": Task.choice, "texts": ["story"], "choices": ["one", "two"], "label": "right"}
    assert read(path, classes=["1", "2"], **how) == [(["<s>once<$>a<e>", "<s>once<$>b<e>"], 1.0)]


def test_the_marks_have_the_ids_behind_the_vocabulary() -> None:
    renderer = TaskRenderer(VOCABULARY)
    n = VOCABULARY.vocab_size
    assert renderer.special == {START: n, DELIMITER: n + 1, EXTRACT: n + 2} and renderer.vocab_size == n + 3
    [example] = renderer.encode([renderer.sequence("a", "b")])
    assert not example.mask[0] and example.mask[1:].all()  # of the auxiliary language model


def test_what_has_no_label_is_dropped_with_a_reason(tmp_path: Path) -> None:
    rows = ["a\t1", "a\t", "\t0", "a\t7", "a\tx", f"{'a' * 99}\t0", "a\tnan", "a"]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "\n".join(rows))
    how = LabelledConfig(path=str(tmp_path / "a.tsv"), task=Task.classification, texts=["text"], classes=["0", "1"])
    found = read_labelled(how, VOCABULARY, 16)
    assert [shown(item) for item in found.items] == [(["<s>a<e>"], 1.0)] and found.tally.records == 8
    assert {reason: count for reason, (count, _) in found.tally.dropped.items()} == {
        "no label": 1,
        "an empty text": 1,
        "a label that is none of the classes or answers": 3,
        "longer than 16 tokens": 1,
        "a row with more or fewer columns than there are names": 1,
    }
    write_lines(tmp_path / "b.jsonl", [{"a": "x", "b": "y", "label": label} for label in (0, "nan", [1], "1e400", 5)])
    similar = LabelledConfig(path=str(tmp_path / "b.jsonl"), task=Task.similarity, texts=["a", "b"])
    found = read_labelled(similar, VOCABULARY, 16)
    assert [item.label for item in found.items] == [0.0, 5.0]
    assert found.tally.dropped == {"a label that is no number": (3, "b.jsonl:2")}
    record = {"a": "x", "ends": ["only"], "label": 0}
    choice = LabelledConfig(
        path=str(write_lines(tmp_path / "c.jsonl", [record])), task=Task.choice, texts=["a"], choices=["ends"]
    )
    with pytest.raises(UserError, match="1 dropped: fewer than two answers to choose from"):
        read_labelled(choice, VOCABULARY, 16)


def test_settings_of_a_task_fit_it() -> None:
    for wrong, words in (
        ({"task": Task.similarity, "texts": ["a"]}, "has two"),
        ({"task": Task.classification, "texts": ["a", "b", "c"], "classes": ["0", "1"]}, "has one or two"),
        ({"task": Task.classification, "texts": ["a"]}, "at least two"),
        ({"task": Task.choice, "texts": ["a"]}, "fields of answers"),
        ({"task": Task.similarity, "texts": ["a", "b"], "classes": ["0"]}, "leave classes out"),
    ):
        with pytest.raises(UserError, match=words):
            LabelledConfig(path="a.jsonl", **wrong)


def test_tasks_of_the_shared_data_have_their_counts(shared_data: Path) -> None:
    def count(name: str, **how: Any) -> tuple[int, int]:
        found = read_labelled(LabelledConfig(path=str(shared_data / name), **how), VOCABULARY, 9999)
        return len(found.items), found.tally.records

    cola = {"columns": ["source", "label", "mark", "text"], "texts": ["text"], "classes": ["0", "1"]}
    files = ["in_domain_train", "in_domain_dev", "out_of_domain_dev"]
    counts = [count(f"tasks/cola/{file}.tsv", task=Task.classification, **cola) for file in files]
    assert counts == [(8551, 8551), (527, 527), (516, 516)]
    sts = {"columns": ["score", "a", "b"], "label": "score", "texts": ["a", "b"]}
    assert count("finetune/similarity/sts2015-images.tsv", task=Task.similarity, **sts) == (750, 1500)
    copa = {"texts": ["premise", "question"], "choices": ["choice1", "choice2"]}
    assert count("finetune/multiple_choice/copa-gmt.val.jsonl", task=Task.choice, **copa) == (100, 100)
