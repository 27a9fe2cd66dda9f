"""Answers are computed once: of equal requests, of an earlier start, and of one that was killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from tests.helpers.gpt_twins import CFG, ours, random_texts
from tests.helpers.seeds import seeded
from trainer.distributed.mesh import Mesh
from trainer.evaluation.answers import Writing
from trainer.evaluation.journal import Journal
from trainer.evaluation.scoring import Scoring
from trainer.inference.requests import Pair, Sampling
from trainer.inference.scorer import score
from trainer.model.gpt import GPT

GREEDY = Writing(Sampling(0.0), 5, (), 0)


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> GPT:
    return ours(CFG, seeded(), mesh)


def pairs(n: int, seed: int) -> list[Pair]:
    return [(ids[:5], ids[5:]) for ids in random_texts([9 + i for i in range(n)], CFG.vocab_size, seed)]


class Counting:
    """A `Scoring` over a folder, and how many requests it had to compute."""

    def __init__(self, model: GPT, folder: Path | None, monkeypatch: pytest.MonkeyPatch, dies_after: int = 99) -> None:
        self.computed = 0
        journal = Journal(folder, 0)
        add: Callable[[Any], None] = journal.add

        def counted(rows: Any) -> None:
            if self.computed >= dies_after:
                raise KeyboardInterrupt
            self.computed += len(rows)
            add(rows)

        monkeypatch.setattr(journal, "add", counted)
        self.scoring = Scoring(model, journal, 2, lambda ids: "".join(map(chr, ids)))


def test_an_answer_is_computed_once(model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pairs(6, seeded())
    first = Counting(model, tmp_path, monkeypatch)
    answers = first.scoring.likelihoods("t", [*asked, *asked])
    assert first.computed == 6 and answers[:6] == answers[6:]
    for answer, scores in zip(answers, score(model, asked), strict=False):
        assert answer.log_p == pytest.approx(scores.log_p.double().sum().item(), abs=1e-5)
        assert answer.tokens == len(scores.log_p)
    again = Counting(model, tmp_path, monkeypatch)
    more = pairs(8, seeded() + 1)
    assert again.scoring.likelihoods("t", [*more, *asked])[8:] == answers[:6]
    assert again.computed == 8
    nowhere = Counting(model, None, monkeypatch)
    assert nowhere.scoring.likelihoods("t", asked)[3].log_p == pytest.approx(answers[3].log_p, abs=1e-5)


def test_what_was_interrupted_goes_on(model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of the journal is torn, as by a kill in mid-write: its answer alone is computed again."""
    asked = pairs(7, seeded())
    whole = Counting(model, None, monkeypatch).scoring.likelihoods("t", asked)
    killed = Counting(model, tmp_path, monkeypatch, dies_after=4)
    with pytest.raises(KeyboardInterrupt):
        killed.scoring.likelihoods("t", asked)
    killed.scoring.journal.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    second = Counting(model, tmp_path, monkeypatch)
    got = second.scoring.likelihoods("t", asked)
    assert second.computed == 7 - 3
    for a, b in zip(got, whole, strict=True):
        assert (a.log_p, a.greedy, a.tokens) == (pytest.approx(b.log_p, abs=1e-5), b.greedy, b.tokens)


def test_texts_written_are_in_the_journal_too(model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their rule: another number of tokens is another request."""
    prompts = random_texts([3, 9, 20], CFG.vocab_size, seeded())
    first = Counting(model, tmp_path, monkeypatch)
    texts = first.scoring.continuations("t", prompts, GREEDY, None)
    again = Counting(model, tmp_path, monkeypatch)
    assert again.scoring.continuations("t", prompts, GREEDY, None) == texts and again.computed == 0
    longer = again.scoring.continuations("t", prompts, Writing(Sampling(0.0), 7, (), 0), None)
    assert again.computed == 3 and [ids[:5] for ids in longer] == texts


def test_drawn_texts_depend_on_prompt_and_seed_alone(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_texts([3, 9, 20, 4, 11], CFG.vocab_size, seeded())
    drawn = Writing(Sampling(1.0, top_k=9), 8, (), 5)
    scoring = Counting(model, None, monkeypatch).scoring
    whole = scoring.continuations("t", prompts, drawn, None)
    assert scoring.continuations("t", prompts[::-1], drawn, None)[::-1] == whole
    assert scoring.continuations("t", prompts, Writing(Sampling(1.0, top_k=9), 8, (), 6), None) != whole


def test_long_continuations_are_scored_over_windows(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids,) = random_texts([3 * CFG.n_ctx], CFG.vocab_size, seeded())
    scoring = Counting(model, None, monkeypatch).scoring
    (answer,) = scoring.likelihoods("t", [(ids[:10], ids[10:])])
    (text,) = scoring.texts("t", [ids[9:]])
    assert (answer.tokens, answer.cut) == (len(ids) - 10, 9)
    assert answer.log_p == pytest.approx(text.log_p, abs=1e-4)


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/journal: .*give output=, another folder"):
        Journal(tmp_path / "file" / "journal", 0).add({"a": {"x": 1}})


def test_a_strangers_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"sha": "a", "n": 1}\n[1]\n{"sha": 3}\n\nnull\n{"sha": "b", "n": 2}\n{"sha": "a"'
    )
    assert Journal(tmp_path, 0).read({"a", "b", "c"}) == {"a": {"n": 1}, "b": {"n": 2}}
