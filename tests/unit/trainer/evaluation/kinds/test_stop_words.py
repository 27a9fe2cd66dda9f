"""LAMBADA's filter: a word of the list may not be the one that the model says, by brute force over transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.evaluation_data import Documents, Row, random_checkpoint, write_rows
from tests.helpers.seeds import seeded
from trainer.config.inference import Number
from trainer.distributed.mesh import Mesh
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.evaluation import plan_task
from trainer.evaluation.journal import Journal
from trainer.evaluation.scoring import Scoring
from trainer.evaluation.subject import Subject
from trainer.evaluation.tasks.find import load_task

N = 12


def test_the_likeliest_word_that_is_no_stop_word(tmp_path: Path, mesh: Mesh) -> None:
    """A model that says its last word again: after "the" the filter lets the next likeliest token take its place."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    from transformers import GPT2LMHeadModel

    seed, tokenizer = seeded(), Tokenizer.load("gpt2")
    hf, checkpoint = random_checkpoint(tmp_path, 96, seed, scale=10.0)
    theirs, draws, documents = GPT2LMHeadModel.from_pretrained(hf).eval(), random.Random(seed), Documents(seed)
    texts = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    stopped = [i for i, text in texts.items() if text[:1] == " " and text[1:].lower() in ENGLISH_STOP_WORDS]
    assert len(stopped) > 300

    def likeliest(ids: list[int], filtered: bool) -> int:
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, -1]
        if filtered:
            logits[stopped] = -torch.inf
        return int(logits.argmax())

    rows: list[Row] = []
    while len(rows) < N:
        context = f"{documents.text(3, 9)} {draws.choice(('the', 'of', 'to', 'stone', 'river'))}"
        ids = tokenizer.encode(context)
        filtered = len(rows) % 2 == 0
        if filtered and likeliest(ids, False) not in stopped:
            continue  # the filter has to matter
        new = [likeliest(ids, filtered)]
        new += [likeliest([*ids, *new], False)] * (len(rows) % 3 == 0)
        word = tokenizer.decode(new) if len(rows) % 4 else " angel"
        if word.strip() == word[1:] and tokenizer.encode(context + word)[: len(ids)] == ids:
            rows.append({"context": context, "word": word})
    write_rows(tmp_path / "a.jsonl", rows)
    completion = {"context": "{{ context }}", "continuation": "{{ word }}", "stop_words": True}
    body = {"about": "x", "data": {"files": {"a.jsonl": None}, "format": "jsonl"}, "completion": completion}
    (tmp_path / "mine.yaml").write_text(json.dumps(body), encoding="utf-8")
    plan = plan_task("mine", load_task(str(tmp_path / "mine.yaml")), str(tmp_path), shots=None, limit=None, seed=seed)
    subject = Subject.find(str(checkpoint), None, Number.fp32)
    scoring = Scoring(subject.on(mesh), Journal(None, 0), 5, subject.tokenizer.decode)
    outcome = plan.prepared(Encoder(subject.tokenizer), 96)(scoring)

    expected: dict[str, list[float]] = {"acc": [], "acc_no_stop_words": []}
    for row in rows:
        ids, whole = tokenizer.encode(row["context"]), tokenizer.encode(row["context"] + row["word"])
        for name, filtered in (("acc", False), ("acc_no_stop_words", True)):
            said = [likeliest(whole[:at], filtered and at == len(ids)) for at in range(len(ids), len(whole))]
            expected[name].append(float(said == whole[len(ids) :]))
    for name, some in expected.items():
        assert [sample["right"][name] for sample in outcome.samples] == some, (seed, name)
        assert outcome.figures[name] == sum(some) / N
    assert expected["acc"] != expected["acc_no_stop_words"] and 0 < sum(expected["acc_no_stop_words"]) < N, seed
