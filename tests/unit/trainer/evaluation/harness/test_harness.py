"""Figures of lm-evaluation-harness over our model are those of its own HFLM over the same weights in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from tests.helpers.evaluation_data import Documents, random_checkpoint, write_rows
from tests.helpers.seeds import seeded
from trainer.config.inference import Number
from trainer.distributed.mesh import Mesh
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.harness.local_data import descriptions, splits_in
from trainer.evaluation.harness.run import plan_tasks
from trainer.evaluation.journal import Journal
from trainer.evaluation.scoring import Scoring
from trainer.evaluation.subject import Subject

lm_eval = pytest.importorskip("lm_eval", reason="the eval extra is not installed")
STOCK = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "blimp_wh_island": "blimp/wh_island.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "nq_open": "nq_open/nq_open.yaml",
}
ON_TEST = ("lambada_openai", "wikitext")  # the others are validated on the split `validation`
N = {"wikitext": 2, "nq_open": 4}
WRITTEN = 40  # tokens of an answer: the task's 256 are more than one of the models has


def write_tasks(folder: Path, seed: int) -> None:
    """Each task's splits, as `task_data` takes them."""
    documents = Documents(seed)
    of_name = {"lambada_openai": documents.lambada, "blimp_wh_island": documents.blimp}
    for task in STOCK:
        make = of_name.get(task) or getattr(documents, task)
        write_rows(folder / task / "train.jsonl", make(N.get(task, 12) + 6))
        write_rows(folder / task / f"{'test' if task in ON_TEST else 'validation'}.jsonl", make(N.get(task, 12)))


def of_hflm(hf: Path, folder: Path, described: Path, tasks: list[str], shots: int | None) -> dict[str, Any]:
    """The figures that HFLM gives on the CPU in fp32, from the same files, as the harness's guide tells to do it."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    described.mkdir()
    for task in tasks:
        files = {path.stem: str(path) for path in (folder / task).glob("*.jsonl")}
        splits = {f"{split}_split": split if split in files else None for split in ("validation", "test")}
        body = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / STOCK[task]),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            **splits,
        }
        (described / f"{task}.yaml").write_text(json.dumps(body), encoding="utf-8")
    model = HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(described), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, num_fewshot=shots, bootstrap_iters=0, gen_kwargs=GEN
    )
    return found["results"]


GEN = {"max_gen_toks": WRITTEN}


def of_ours(checkpoint: Path, folder: Path, mesh: Mesh, tasks: list[str], shots: int | None) -> dict[str, Any]:
    subject = Subject.find(str(checkpoint), None, Number.fp32)
    scoring = Scoring(subject.on(mesh), Journal(None, 0), 5, subject.tokenizer.decode)
    how: dict[str, Any] = {"shots": shots, "limit": None, "seed": 1234, "max_new_tokens": WRITTEN}
    outcomes = plan_tasks(tasks, task_data=str(folder), **how).run(scoring, Encoder(subject.tokenizer))
    return {task: {"n": outcome.n, **outcome.figures} for task, outcome in outcomes.items()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Each figure of both, by task and metric, of which the relative difference is above 1e-6."""
    found = {}
    for task, figures in theirs.items():
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if rule and "stderr" not in metric and isinstance(value, float):
                mine = ours[task][metric if rule == "none" else f"{metric}/{rule}"]
                if abs(mine - value) > 1e-6 * abs(value):
                    found[f"{task} {metric}"] = (mine, value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n_ctx", [128, 1024])
def test_figures_are_those_of_hflm(n_ctx: int, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and prompts of 128 tokens and more are cut, or scored over windows."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs `pip list`
    seed = seeded()
    hf, checkpoint = random_checkpoint(tmp_path, n_ctx, seed)
    write_tasks(tmp_path / "data", seed)
    for name, tasks, shots in (("none", list(STOCK), None), ("two", ["piqa", "nq_open"], 2)):
        theirs = of_hflm(hf, tmp_path / "data", tmp_path / name, tasks, shots)
        ours = of_ours(checkpoint, tmp_path / "data", mesh, tasks, shots)
        assert set(ours) == set(theirs) == set(tasks)
        assert not differences(ours, theirs), f"{seed=}"
        assert all(ours[task]["n"] == N.get(task, 12) for task in tasks if task != "blimp_wh_island")
    assert 0 < ours["piqa"]["acc"] < 1


def test_a_task_that_nobody_knows_is_one_line(tmp_path: Path) -> None:
    """Before a model is loaded."""
    write_rows(tmp_path / "pika" / "test.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"tasks=\[pika\]: neither a task of conf/task/ nor of lm-evaluation-harness"):
        plan_tasks(["pika"], task_data=str(tmp_path), shots=0, limit=None, seed=0, max_new_tokens=None)


def test_data_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    """Before a model is loaded."""
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": ')
    with pytest.raises(UserError, match=r"^lm-evaluation-harness cannot read piqa \(.*: its data come from"):
        plan_tasks(["piqa"], task_data=str(tmp_path), shots=0, limit=None, seed=0, max_new_tokens=None)


def test_splits_of_two_forms_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "train.json", [{"text": "a"}])
    assert set(splits_in(tmp_path)) == {"train", "test"}  # one reader reads both
    for name in ("train.jsonl", "validation.csv"):
        path = write_rows(tmp_path / name, [{"text": "a"}])
        with pytest.raises(UserError, match=r"give each split once, and all of them in one form"):
            splits_in(tmp_path)
        path.unlink()


def test_descriptions_leave_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in the folder of temporary files, and those beside the data."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = write_rows(tmp_path / "piqa" / "test.jsonl", [{"text": "a"}])
    (tmp_path / "piqa.yaml").write_text("mine")
    with descriptions({"piqa": splits_in(tmp_path / "piqa")}) as folder:
        assert (Path(folder) / "piqa.yaml").is_file() and Path(folder) != tmp_path
    assert not Path(folder).exists() and data.is_file() and (tmp_path / "piqa.yaml").read_text() == "mine"
