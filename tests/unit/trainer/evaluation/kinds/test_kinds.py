"""Figures of each kind of task against transformers' probabilities of one text at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from tests.helpers.evaluation_data import Documents, random_checkpoint, write_rows
from tests.helpers.gpt_twins import greedy, log_p
from tests.helpers.seeds import seeded
from trainer.config.inference import Number
from trainer.distributed.mesh import Mesh
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.evaluation import plan_task
from trainer.evaluation.journal import Journal
from trainer.evaluation.kinds.kind import Outcome
from trainer.evaluation.scoring import Scoring
from trainer.evaluation.subject import Subject
from trainer.evaluation.tasks.description import TaskConfig
from trainer.evaluation.tasks.find import load_task

N_CTX = 96


class Home:
    """A random model twice, and documents."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        from transformers import GPT2LMHeadModel

        self.seed, self.folder = seeded(), folder
        hf, checkpoint = random_checkpoint(folder, N_CTX, self.seed)
        self.theirs = GPT2LMHeadModel.from_pretrained(hf).eval()
        subject = Subject.find(str(checkpoint), None, Number.fp32)
        self.encoder = Encoder(subject.tokenizer)
        self.scoring = Scoring(subject.on(mesh), Journal(None, 0), 5, subject.tokenizer.decode)
        documents = Documents(self.seed)
        self.piqa, self.lambada = documents.piqa(12), documents.lambada(10)
        self.rows = {"piqa": self.piqa, "lambada": self.lambada, "nq": documents.nq_open(8)}
        for name, rows in self.rows.items():
            write_rows(folder / f"{name}.jsonl", rows)

    def run(self, name: str, shots: int | None = None, limit: int | None = None, **body: Any) -> Outcome:
        described = {"about": "x", "data": {"files": {f"{name}.jsonl": None}, "format": "jsonl"}, **body}
        path = self.folder / f"task-{name}.yaml"
        path.write_text(json.dumps(described), encoding="utf-8")
        task: TaskConfig = load_task(str(path))
        plan = plan_task(name, task, str(self.folder), shots=shots, limit=limit, seed=self.seed)
        return plan.prepared(self.encoder, N_CTX)(self.scoring)

    def log_p(self, context: str, continuation: str) -> tuple[float, bool, int]:
        """transformers' own: nats, whether each token is the likeliest, tokens."""
        tokenizer = self.encoder.tokenizer
        whole, before = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        ids = ([tokenizer.eot_id] if before == 0 else whole[:before], whole[before:])
        found, likeliest = log_p(self.theirs, ids[0], ids[1])
        return found.double().sum().item(), bool(likeliest.all()), len(ids[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Home:
    return Home(tmp_path_factory.mktemp("home"), mesh)


def close(got: float, expected: float) -> bool:
    return abs(got - expected) <= 1e-5 * max(1.0, abs(expected))


def test_choices_by_four_normalisers(home: Home) -> None:
    choices = {
        "context": "Question: {{ goal }}\nAnswer:",
        "options": ["{{ sol1 }}", "{{ sol2 }}"],
        "correct": "label",
        "unconditional": "Answer:",
    }
    outcome = home.run("piqa", choices=choices)
    right: dict[str, list[bool]] = {"acc": [], "acc_per_token": [], "acc_per_byte": [], "acc_unconditional": []}
    for row, sample in zip(home.piqa, outcome.samples, strict=True):
        options = [row["sol1"], row["sol2"]]
        found = [home.log_p(f"Question: {row['goal']}\nAnswer:", f" {option}") for option in options]
        assert all(close(a, b[0]) for a, b in zip(sample["log_p"], found, strict=True)), home.seed
        sums = [f[0] for f in found]
        rules = {
            "acc": sums,
            "acc_per_token": [f[0] / f[2] for f in found],
            "acc_per_byte": [f[0] / len(o.encode()) for f, o in zip(found, options, strict=True)],
            "acc_unconditional": [s - home.log_p("Answer:", f" {o}")[0] for s, o in zip(sums, options, strict=True)],
        }
        for name, scores in rules.items():
            right[name].append(scores.index(max(scores)) == row["label"])
    for name, some in right.items():
        mean = sum(some) / len(some)
        assert outcome.figures[name] == pytest.approx(mean)
        assert outcome.figures[f"{name}_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(some) - 1)))
    assert outcome.n == 12 and not outcome.notes.get("contexts_cut")


def test_a_context_may_hold_the_option(home: Home) -> None:
    """As Winograd's: the candidate stands in the context, and what follows is scored."""
    choices = {
        "context": "{{ goal }} {{ option }}",
        "continuation": " {{ goal }}",
        "options": ["a stone", "an angel"],
        "correct": "label",
    }
    outcome = home.run("piqa", limit=3, choices=choices)
    for row, sample in zip(home.piqa, outcome.samples, strict=False):
        expected = [home.log_p(f"{row['goal']} {option}", f" {row['goal']}")[0] for option in ("a stone", "an angel")]
        assert all(close(a, b) for a, b in zip(sample["log_p"], expected, strict=True)), home.seed


@pytest.mark.parametrize(("ties", "acc"), [(0.0, 0.5), (0.5, 0.5)])
def test_a_tie_counts_what_the_task_says(ties: float, acc: float, home: Home) -> None:
    """Two equal options: by rule 0 the first one is chosen, by rule 1/2 each question counts one half."""
    choices = {"options": ["{{ sol1 }}", "{{ sol1 }}"], "correct": "loop % 2", "ties": ties}
    rows = [{**row, "loop": i} for i, row in enumerate(home.piqa)]
    write_rows(home.folder / "ties.jsonl", rows)
    outcome = home.run("ties", choices=choices)
    assert outcome.figures["acc"] == acc
    assert {s["right"]["acc"] for s in outcome.samples} == ({0.5} if ties else {0.0, 1.0})


def test_a_question_whose_context_is_cut_is_counted_once(home: Home) -> None:
    """Though both of its options lose the beginning of their context."""
    choices = {"context": "{{ text }}", "options": ["a stone", "an angel"], "correct": "0"}
    outcome = home.run("lambada", choices=choices)
    encode = home.encoder.tokenizer.encode
    cut = sum(len(encode(f"{row['text']} an angel")) > N_CTX + 1 for row in home.lambada)
    assert 0 < outcome.notes["contexts_cut"] <= cut and "cut" not in outcome.samples[0]


def test_completions_of_lambada(home: Home) -> None:
    """Texts longer than n_ctx lose their beginning, which is counted."""
    completion = {"context": "{{ text.rsplit(' ', 1)[0] }}", "continuation": " {{ text.rsplit(' ', 1)[1] }}"}
    outcome = home.run("lambada", completion=completion)
    encode = home.encoder.tokenizer.encode
    sums, cut = [], 0
    for row, sample in zip(home.lambada, outcome.samples, strict=True):
        context, word = row["text"].rsplit(" ", 1)
        ids, n = encode(row["text"]), len(encode(row["text"])) - len(encode(context.rstrip()))
        ids = ids[-(N_CTX + 1) :]
        expected = log_p(home.theirs, ids[:-n], ids[-n:])[0].double().sum().item()
        assert close(sample["log_p"], expected), (home.seed, word)
        sums.append(expected)
        cut += len(encode(row["text"])) > N_CTX + 1
    assert outcome.figures["ppl"] == pytest.approx(math.exp(-sum(sums) / len(sums)), rel=1e-4)
    assert outcome.notes["contexts_cut"] == cut > 0


def test_perplexity_by_words_of_the_original(home: Home) -> None:
    (home.folder / "wiki.txt").write_text(" = A title = \n \n A stone , it is said , cost 1 @,@ 000 . \n")
    text = "= A title =\n\nA stone, it is said, cost 1,000.\n"
    data = {"files": {"wiki.txt": None}, "format": "text"}
    shown = {"unit": "words", "detokeniser": "wikitext", "ends_of_lines": True}
    outcome = home.run("wiki", data=data, perplexity=shown)
    ids = [home.encoder.tokenizer.eot_id, *home.encoder.tokenizer.encode(text)]
    nats = -log_p(home.theirs, ids[:1], ids[1:])[0].double().sum().item()
    words = len(" = A title = A stone , it is said , cost 1 @,@ 000 . ".split()) + 3
    assert outcome.notes["divisor"] == f"{words} words"
    assert outcome.figures["ppl_per_token"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    by_token = home.run("wiki", data=data, perplexity={**shown, "unit": "tokens", "ends_of_lines": False})
    assert by_token.notes["divisor"] == f"{len(ids) - 1} tokens"  # the end-of-text token is no part of the text
    assert by_token.figures["ppl"] == by_token.figures["ppl_per_token"]
    assert outcome.figures["ppl"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert outcome.figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert f"windows of {N_CTX} tokens" in outcome.notes["context"]


def test_written_texts_are_transformers_greedy_ones(home: Home) -> None:
    """Against the answers that transformers would give: exact match is 1 for these, and 0 for others."""
    eot = home.encoder.tokenizer.eot_id
    rows = []
    for i, row in enumerate(home.rows["nq"]):
        ids = home.encoder.tokenizer.encode(f"Q: {row['question']}?\nA:")
        new = greedy(home.theirs, ids, 6, eot)
        text = home.encoder.tokenizer.decode([t for t in new if t != eot]).split("\n")[0].strip()
        rows.append({**row, "answer": [text if i % 2 else "quite another one"]})
    write_rows(home.folder / "greedy.jsonl", rows)
    generation = {"context": "Q: {{ question }}?\nA:", "answers": "answer", "metric": "exact_text", "max_new_tokens": 6}
    outcome = home.run("greedy", generation={**generation, "confidence": True})
    assert [s["text"] == s["answers"][0] for s in outcome.samples] == [bool(i % 2) for i in range(len(rows))]
    assert outcome.figures["exact_text"] == 0.5
    log_ps = []
    for row in rows:
        ids = home.encoder.tokenizer.encode(f"Q: {row['question']}?\nA:")
        log_ps.append(log_p(home.theirs, ids, greedy(home.theirs, ids, 6, eot))[0].sum().item())
    surest = max(range(len(rows)), key=lambda i: log_ps[i])
    assert outcome.figures["exact_text_top_1_percent"] == float(surest % 2), home.seed


def test_demonstrations_depend_on_seed_task_and_document(home: Home) -> None:
    """Not on the limit; the document itself is never shown; those that do not fit are counted."""
    completion = {"context": "{{ goal }}:", "continuation": " {{ sol1 }}"}
    two = home.run("piqa", shots=2, completion=completion)
    few = home.run("piqa", shots=2, limit=3, completion=completion)
    for a, b in zip(few.samples, two.samples, strict=False):
        assert a["log_p"] == pytest.approx(b["log_p"], rel=1e-6)
    assert two.notes["shots"] == 2
    many = home.run("piqa", shots=11, completion=completion)
    assert many.notes["fewer_shots"] == 12 and "contexts_cut" not in many.notes
    with pytest.raises(UserError, match="shots=12: task piqa has 11 documents to show: give at most 11"):
        home.run("piqa", shots=12, completion=completion)


def test_a_document_is_never_its_own_demonstration(home: Home) -> None:
    described = {"about": "x", "data": {"files": {"piqa.jsonl": None}, "format": "jsonl"}}
    body = {**described, "completion": {"context": "{{ goal }}:", "continuation": " {{ sol1 }}"}}
    path = home.folder / "own.yaml"
    path.write_text(json.dumps(body), encoding="utf-8")
    prompts = []
    for seed in (home.seed, home.seed + 1):
        plan = plan_task("own", load_task(str(path)), str(home.folder), shots=11, limit=None, seed=seed)
        for q in plan.questions:
            shown = plan.prompts.before(q.number, lambda _: True)
            others = [f"{row['goal']}: {row['sol1']}" for i, row in enumerate(home.piqa) if i != q.number]
            assert sorted(shown.removesuffix("\n\n").split("\n\n")) == sorted(others)
            prompts.append(shown)
    assert len(set(prompts)) == len(prompts)


def test_a_wrong_answer_key_is_named(home: Home) -> None:
    with pytest.raises(UserError, match=r"`correct: label \+ 5` gives [56] for 2 options"):
        home.run("piqa", choices={"options": ["{{ sol1 }}", "{{ sol2 }}"], "correct": "label + 5"})
    assert torch.is_grad_enabled()
