"""Files of each form against what the form means."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from data_pipeline.examples.examples_config import ExamplesConfig, Form, Template
from data_pipeline.examples.read import read_examples, read_preferences, read_prompts
from data_pipeline.examples.records import LONGEST
from tests.helpers.chat import small_vocabulary, write_lines

VOCABULARY = small_vocabulary()
END, ROLES = VOCABULARY.vocab_size + 5, ("system", "user", "assistant")


def said(ids: Sequence[int]) -> list[tuple[str, str]]:
    """The turns of ids under the template roles, taken apart by their special tokens alone."""
    turns: list[tuple[str, str]] = []
    role, held = "", list[int]()
    for id_ in [int(i) for i in ids][1:]:
        known = id_ - VOCABULARY.vocab_size
        if known < 0:
            held.append(id_)
        elif known % 2 == 0:
            role, held = ROLES[known // 2], []
        else:
            turns.append((role, VOCABULARY.decode(held)))
    return turns


def turns_of(path: Path, **how: Any) -> list[list[tuple[str, str]]]:
    found = read_examples(ExamplesConfig(path=str(path), **how), VOCABULARY, 1024)
    return [said(item.ids) for item in found.items]


ASKED = [("user", "2+2?"), ("assistant", "4")]
BOTH = [*ASKED, ("user", "sure?"), ("assistant", "yes")]


@pytest.mark.parametrize(
    ("record", "meant"),
    [
        ({"instruction": "2+2?", "output": "4"}, ASKED),
        ({"instruction": "add", "input": "2+2", "output": "4"}, [("user", "add\n\n2+2"), ("assistant", "4")]),
        ({"instruction": "2+2?", "input": "", "output": "4", "text": "unused"}, ASKED),
        ({"messages": [{"role": r, "content": t} for r, t in BOTH]}, BOTH),
        ({"messages": [{"role": r, "content": t} for r, t in [("system", "be brief"), *ASKED]]},
         [("system", "be brief"), *ASKED]),
        ({"messages": [{"role": r, "content": t} for r, t in [("system", ""), *ASKED]]}, ASKED),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, ASKED),
        ({"system": "be brief", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
         [("system", "be brief"), *ASKED]),
    ],
)  # fmt: skip
def test_a_record_means_its_turns(tmp_path: Path, record: dict[str, Any], meant: list[tuple[str, str]]) -> None:
    assert turns_of(write_lines(tmp_path / "a.jsonl", [record])) == [meant]


def test_instances_of_a_task_are_an_example_each(tmp_path: Path) -> None:
    task = {"instruction": "add", "instances": [{"input": "1+1", "output": "2"}, {"input": "", "output": "more"}]}
    first, second = turns_of(write_lines(tmp_path / "a.jsonl", [task]))
    assert first == [("user", "add\n\n1+1"), ("assistant", "2")]
    assert second == [("user", "add"), ("assistant", "more")]


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_a_completion_continues_its_prompt(tmp_path: Path, answer: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "这个项链太", answer: "美了"}, {"prompt": "", answer: "hi"}])
    long, empty = read_examples(ExamplesConfig(path=str(path)), VOCABULARY, 99).items
    assert VOCABULARY.decode(long.ids.tolist()) == "<|endoftext|>这个项链太美了<|endoftext|>"
    assert VOCABULARY.decode(long.ids[long.mask].tolist()) == "美了<|endoftext|>"
    assert VOCABULARY.decode(empty.ids[empty.mask].tolist()) == "hi<|endoftext|>"
    roles = ExamplesConfig(path=str(path), template=Template.roles)
    assert said(read_examples(roles, VOCABULARY, 99).items[0].ids) == [("user", "这个项链太"), ("assistant", "美了")]


def test_fields_of_other_names_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "4"}])
    how = {"fields": {"prompt": "question", "completion": "answer"}, "template": Template.roles}
    assert turns_of(path, **how) == [ASKED]
    with pytest.raises(UserError, match="the fields answer, question"):
        turns_of(path)
    with pytest.raises(UserError, match="no form has a field pompt"):
        turns_of(path, fields={"pompt": "question"})


def test_arrays_tsv_parquet_and_gzip_hold_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"prompt": f"p{i}\u2028", "completion": f"c{i} é"} for i in range(40)]
    write_lines(tmp_path / "a.jsonl", records)
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(records, indent=1))
    with gzip.open(tmp_path / "c.json.gz", "wt") as f:
        json.dump(records, f, ensure_ascii=False)
    rows = "\r\n".join(f"{r['prompt']}\t{r['completion']}" for r in records)
    (tmp_path / "d.tsv").write_text(f"prompt\tcompletion\n{rows}\n", newline="")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "e.parquet")
    (tmp_path / "unrelated.txt").write_text("nothing")
    found = read_examples(ExamplesConfig(path=str(tmp_path)), VOCABULARY, 99)
    texts = [VOCABULARY.decode(item.ids.tolist()[1:-1]) for item in found.items]
    assert texts == [r["prompt"] + r["completion"] for r in records] * 5
    assert found.paths[39:42] == ["a.jsonl:40", "b.json:1", "b.json:2"]
    assert found.tally.dropped == {} and found.tally.records == 200
    (tmp_path / "f.tsv").write_text(rows)
    named = ExamplesConfig(path=str(tmp_path / "f.tsv"), columns=["prompt", "completion"])
    assert len(read_examples(named, VOCABULARY, 99).items) == 40


def test_long_values_of_an_array_come_whole(tmp_path: Path) -> None:
    texts = ["x" * n for n in (1, 70_000, 300_000, 5)]
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "", "completion": t} for t in texts]))
    found = read_examples(ExamplesConfig(path=str(tmp_path / "a.json")), VOCABULARY, 1_000_000)
    assert [VOCABULARY.decode(item.ids.tolist()[1:-1]) for item in found.items] == texts


PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye"


def compared(path: Path, **how: Any) -> list[tuple[list[tuple[str, str]], list[tuple[int, str]]]]:
    """The turns of each prompt, and of each answer its rank and text without the end."""
    found = read_preferences(ExamplesConfig(path=str(path), **how), VOCABULARY, 1024)
    assert all(ids[-1] == END for item in found.items for ids in item.answers)
    assert all(item.prompt[-1] == VOCABULARY.vocab_size + 4 for item in found.items)  # <|assistant_start|>
    return [
        (
            said(i.prompt),
            [(int(r), VOCABULARY.decode(a.tolist()[:-1])) for r, a in zip(i.ranks, i.answers, strict=True)],
        )
        for i in found.items
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": f"{PROMPT}\n\nAssistant: Good bye.", "rejected": f"{PROMPT}\n\nAssistant: Go."},
        {
            "chosen": [*(m := [{"role": r, "content": t} for r, t in
                               [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]]),
                       {"role": "assistant", "content": "Good bye."}],
            "rejected": [*m, {"role": "assistant", "content": "Go."}],
        },
        {"prompt": m, "chosen": [{"role": "assistant", "content": "Good bye."}],
         "rejected": [{"role": "assistant", "content": "Go."}]},
        {"prompt": m, "chosen": "Good bye.", "rejected": "Go."},
        {"prompt": m, "responses": ["Good bye.", "Go."], "ranks": [1, 2]},
    ],
)  # fmt: skip
def test_a_comparison_means_prompt_and_ranked_answers(tmp_path: Path, record: dict[str, Any]) -> None:
    asked = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    assert compared(write_lines(tmp_path / "a.jsonl", [record])) == [(asked, [(0, "Good bye."), (1, "Go.")])]


def test_many_answers_keep_their_ranks_and_ties(tmp_path: Path) -> None:
    record = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [3, 1, 3, 7]}
    asked = [("user", "p")]
    assert compared(write_lines(tmp_path / "a.jsonl", [record])) == [(asked, [(1, "a"), (0, "b"), (1, "c"), (2, "d")])]


def test_prompt_and_answer_fit_into_n_ctx_together(tmp_path: Path) -> None:
    record = {"prompt": "qqqq", "chosen": "zzz", "rejected": "vvvvv"}  # 8 ids, then 4 or 6
    how = ExamplesConfig(path=str(write_lines(tmp_path / "a.jsonl", [record])))
    [item] = read_preferences(how, VOCABULARY, 14).items
    assert [len(item.prompt), *map(len, item.answers)] == [8, 4, 6]
    with pytest.raises(UserError, match="1 dropped: longer than 13 tokens"):
        read_preferences(how, VOCABULARY, 13)
    assert len(read_prompts(how, VOCABULARY, 9).items) == 1
    with pytest.raises(UserError, match="1 dropped: longer than 7 tokens"):
        read_prompts(how, VOCABULARY, 8)


def test_a_prompt_given_twice_counts_once(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "Hi"}
    pair = {key: [asked, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    right, wrong = {"prompt": "Hi", **pair}, {"prompt": "Bye", **pair}
    path = write_lines(tmp_path / "a.jsonl", [right, wrong])
    found = read_preferences(ExamplesConfig(path=str(path)), VOCABULARY, 99)
    assert [said(item.prompt) for item in found.items] == [[("user", "Hi")]]
    assert found.tally.dropped == {"'prompt' is not how 'chosen' and 'rejected' begin": (1, "a.jsonl:2")}


def test_prompts_end_where_an_answer_begins(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": r, "content": t} for r, t in BOTH]},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    (cut, turns), (whole, _) = read_prompts(ExamplesConfig(path=str(path)), VOCABULARY, 1024).items
    assert [(turn.role, turn.text) for turn in turns] == BOTH[:-1]
    assert said(cut) == BOTH[:-1] and said(whole) == [("user", "Hi")]
    assert cut[-1] == whole[-1] == VOCABULARY.vocab_size + 4
    pair = {"chosen": f"{PROMPT}\n\nAssistant: Good bye.", "rejected": f"{PROMPT}\n\nAssistant: Go."}
    path = write_lines(tmp_path / "b.jsonl", [pair])
    prompts = read_prompts(ExamplesConfig(path=str(path)), VOCABULARY, 1024).items
    compared = read_preferences(ExamplesConfig(path=str(path)), VOCABULARY, 1024).items
    assert prompts[0].ids.tolist() == compared[0].prompt.tolist()
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "Hi"}])
    [alone] = read_prompts(ExamplesConfig(path=str(path), template=Template.roles), VOCABULARY, 1024).items
    assert alone.ids.tolist() == whole.tolist()


REASONS = [
    (Form.messages, b"{broken", "not JSON"),
    (Form.messages, b"[" * 100_000, "not JSON"),
    (Form.messages, b'{"messages": "\xff"}', "not UTF-8"),
    (Form.messages, b"[1]", "not an object with fields"),
    (Form.messages, b'{"prompt": "a"}', "no list of {role, content}"),
    (Form.messages, b'{"messages": [{"role": "tool", "content": "a"}]}', "a turn that is none of"),
    (Form.messages, b'{"messages": [{"role": ["user"], "content": "a"}]}', "a turn that is none of"),
    (Form.messages, b'{"messages": [{"role": "user", "content": ["a"]}]}', "no text in 'content'"),
    (Form.messages, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not Unicode"),
    (Form.messages, b'{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
    (Form.messages, b'{"messages": []}', "no answer"),
    (Form.messages, b'{"messages": [{"role": "assistant", "content": " "}]}', "an empty turn"),
    (Form.messages, b'{"messages": [{"role": "assistant", "content": "%s"}]}' % (b"a" * 600), "longer than 513 tokens"),
    (Form.alpaca, b'{"instruction": "a", "instances": {}}', "'instances' is not a list of objects"),
    (Form.completion, b'{"prompt": [{"role": "system", "content": "a"}], "completion": "b"}', "more than a prompt"),
    (Form.pair, b'{"chosen": "hello", "rejected": "bye"}', "a text that does not begin with"),
    (Form.pair, b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "the answers are the same text"),
    (Form.pair, b'{"chosen": "\\n\\nHuman: a", "rejected": "\\n\\nHuman: a"}', "the answers are the same text"),
    (Form.pair, b'{"prompt": "a", "chosen": "b", "rejected": ""}', "an empty answer"),
    (Form.ranks, b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}', "no answer is ranked above another"),
    (
        Form.ranks,
        b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}',
        "'responses' and 'ranks' are not two lists",
    ),
    (Form.ranks, b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1, NaN]}', "'ranks' holds something"),
]


@pytest.mark.parametrize(("form", "bad", "reason"), REASONS)
def test_what_is_no_example_is_dropped_with_a_reason(tmp_path: Path, form: Form, bad: bytes, reason: str) -> None:
    good = {
        Form.messages: {"messages": [{"role": "assistant", "content": "a"}]},
        Form.alpaca: {"instruction": "a", "output": "b"},
        Form.completion: {"prompt": "a", "completion": "b"},
        Form.pair: {"prompt": "a", "chosen": "b", "rejected": "c"},
        Form.ranks: {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]},
    }[form]
    line = json.dumps(good).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join((line, bad, bad, line)))
    read = read_preferences if form in (Form.pair, Form.ranks) else read_examples
    found = read(ExamplesConfig(path=str(tmp_path), form=form), VOCABULARY, 512)
    assert len(found.items) == 2 and found.tally.records == 4
    [(name, (count, first))] = found.tally.dropped.items()
    assert name.startswith(reason) and (count, first) == (2, "a.jsonl:2")
    assert f"2 dropped: {name} (first: a.jsonl:2)" in found.summary()[1]


def test_a_file_without_an_example_is_an_error(tmp_path: Path) -> None:
    def refused(name: str, content: str, **how: Any) -> str:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            read_examples(ExamplesConfig(path=str(tmp_path / name), **how), VOCABULARY, 512)
        return str(error.value)

    assert "no record there" in refused("empty.jsonl", "")
    assert "2 dropped: not JSON (first: bad.jsonl:1)" in refused("bad.jsonl", "{\n}\n")
    assert "no example in 1 records (form alpaca, template roles)" in refused(
        "a.jsonl", '{"prompt": "a"}', form=Form.alpaca
    )
    assert "no .json, .jsonl, .tsv or .parquet file" in refused("a.csv", "prompt,completion")
    assert "the form pair holds no conversations" in refused("b.jsonl", '{"chosen": "a", "rejected": "b"}')
    with pytest.raises(UserError, match="the form completion holds no comparisons"):
        read_preferences(ExamplesConfig(path=str(tmp_path / "a.jsonl")), VOCABULARY, 512)


def test_a_damaged_array_keeps_what_came_before(tmp_path: Path) -> None:
    whole = json.dumps([{"prompt": "a", "completion": "b"}] * 3)
    for number, (content, kept) in enumerate(((whole[:-1], 3), (whole[:-9], 2), (whole[:-1] + " {]", 3))):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        found = read_examples(ExamplesConfig(path=str(path)), VOCABULARY, 99)
        assert len(found.items) == kept and len(found.tally.dropped) == 1


def test_a_long_record_is_never_held(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, long = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * LONGEST}
    write_lines(tmp_path / "a.jsonl", [good, long, good])
    pq.write_table(pa.Table.from_pylist([good, long, good]), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps([good, long]))
    found = read_examples(ExamplesConfig(path=str(tmp_path)), VOCABULARY, 99)
    assert len(found.items) == 5
    assert sorted(found.paths) == ["a.jsonl:1", "a.jsonl:3", "b.parquet:1", "b.parquet:3", "c.json:1"]
    assert sum(count for count, _ in found.tally.dropped.values()) == 3


def test_files_of_the_shared_data_have_their_counts(shared_data: Path) -> None:
    question = {"prompt": "question", "completion": "answer"}
    counts = {
        "instruct/gsm8k.test.jsonl": (1319, question),
        "tasks/gpt3_synthetic/two_digit_addition.jsonl": (2000, {"prompt": "context"}),
        "instruct/seed_tasks.jsonl": (175, {}),
        "tasks/instruct/dummy_conversation.json": (500, {}),
    }
    for name, (count, fields) in counts.items():
        found = read_examples(ExamplesConfig(path=str(shared_data / name), fields=fields), VOCABULARY, 9999)
        assert (len(found.items), found.tally.records, found.tally.dropped) == (count, count, {}), name


def test_pairs_of_hh_split_where_their_texts_part(shared_data: Path) -> None:
    """The prompt is the longest common beginning of both texts that ends in "Assistant:", as characters say it."""
    path = shared_data / "tasks/preference/hh-harmless-base.test.jsonl.gz"
    how = ExamplesConfig(path=str(path), template=Template.plain)
    found = read_preferences(how, VOCABULARY, 99_999)
    assert found.tally.records == 2312 and len(found.items) == 2303  # 5 differ in earlier turns, 4 answers are empty
    with gzip.open(path) as f:
        records = {f"{path.name}:{n}": json.loads(line) for n, line in enumerate(f, 1)}
    exact = 0
    for name, item in zip(found.paths, found.items, strict=True):
        pair = records[name]["chosen"], records[name]["rejected"]
        same = next(i for i, (a, b) in enumerate(zip(*(text + "\0" for text in pair), strict=False)) if a != b)
        end = pair[0].rfind("\n\nAssistant:", 0, same) + len("\n\nAssistant:")
        for text, answer in zip(pair, item.answers, strict=True):
            assert VOCABULARY.decode(answer.tolist()) == " " + text[end:].removeprefix(" ") + "<|endoftext|>"
        prompt = VOCABULARY.decode(item.prompt.tolist()).replace("<|endoftext|>", "")
        exact += prompt == pair[0][:end]
    assert exact > 2290  # others have no space behind a colon
