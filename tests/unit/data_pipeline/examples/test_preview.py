"""The text that `preview` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.examples.examples_config import PreviewConfig, Template
from data_pipeline.examples.forms import Turn
from data_pipeline.examples.preview import COLOURED, PLAIN, preview, shown
from data_pipeline.examples.templates import Renderer
from tests.helpers.chat import small_vocabulary, write_lines

VOCABULARY = small_vocabulary()


def printed(capsys: pytest.CaptureFixture[str], tmp_path: Path, records: list[object], *words: str) -> str:
    VOCABULARY.save(tmp_path)
    path = write_lines(tmp_path / "a.jsonl", records)
    preview(load(PreviewConfig, [f"path={path}", f"tokenizer={tmp_path}", *words]))
    return capsys.readouterr().out


def test_a_preview_shows_masks_counts_and_drops(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Hi <|user_end|>"}, {"role": "assistant", "content": "日本\x1b[31m\u202e"}]
    records = [{"messages": asked}, {"messages": asked[:1]}, {"messages": asked}]
    text = printed(capsys, tmp_path, records, "n=1", "n_ctx=64")
    assert "\x1b" not in text and "\u202e" not in text
    assert text.count("Hi") == 1  # one example is shown
    assert (
        "⟨<|endoftext|>⟩⟨<|user_start|>⟩Hi <|user_end|>⟨<|user_end|>⟩"
        "⟨<|assistant_start|>⟩[日本\\x1b[31m\\u202e⟨<|assistant_end|>⟩]\n" in text
    )
    assert "examples: 2 of 3 records (form messages, template roles): " in text
    assert "examples: 1 dropped: no answer (first: a.jsonl:2)" in text
    assert "packed into 1 rows of n_ctx=64, 90.6% full" in text


def test_a_preview_shows_ranked_answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    text = printed(capsys, tmp_path, [record])
    assert "a prompt of 6 tokens, 3 answers" in text
    answers = [line for line in text.splitlines() if line.startswith("rank")]
    assert answers == [f"rank {r}: [{a}⟨<|assistant_end|>⟩]" for r, a in ((2, "a"), (1, "b"), (2, "c"))]


def test_colour_marks_labels_and_special_tokens() -> None:
    renderer = Renderer(Template.text, VOCABULARY)
    [example] = renderer.encode([renderer.conversation((Turn("user", "a"), Turn("assistant", "b")))])
    assert shown(example, renderer, PLAIN) == "⟨<|endoftext|>⟩a[b⟨<|endoftext|>⟩]"
    dim, bright, green, default = COLOURED
    eot = f"{dim}<|endoftext|>{bright}"
    assert shown(example, renderer, COLOURED) == f"{eot}a{green}b{eot}{default}"


def test_settings_are_checked() -> None:
    words = ["path=a.jsonl", "tokenizer=gpt2"]
    cfg = load(PreviewConfig, [*words, "fields={prompt: question}", "form=completion", "template=plain"])
    assert cfg.fields == {"prompt": "question"} and cfg.template is Template.plain
    for wrong in ("n_ctx=0", "n=-1", "form=chat", "fields={question: prompt}"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            load(PreviewConfig, [*words, wrong])
