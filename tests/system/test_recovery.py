"""A run whose pointer or newest checkpoint is lost goes on from the newest that verifies, and says so."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import load
from tests.helpers.ranks import run_ranks
from tests.system.runs import TINY, finish, make_data, pretrain, printed, start, told
from tests.system.test_resume import story
from tests.system.tracked import client_of, needs_mlflow, sync
from trainer.config.pretrain import PretrainConfig
from trainer.run.folder import RunFolder

COMMON = ("checkpoint.every_steps=3", "checkpoint.keep=2", "checkpoint.keep_best=false", "model.dropout=0.1")
SIX, NINE = "step-00000006.gen-0001", "step-00000009.gen-0001"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps with the checkpoints of 6 and 9, and its data beside it."""
    root = tmp_path_factory.mktemp("recovery")
    make_data(root / "data")
    pretrain(root / "run", f"data.path={root / 'data'}", "max_steps=9", *COMMON)
    return root


def again(whole: Path, run: Path, ranks: int = 1) -> tuple[int, str]:
    """Exit code and stderr of rank 0 of a start to step 9."""
    return finish(start(run, f"data.path={whole / 'data'}", "max_steps=9", *COMMON, ranks=ranks))[0]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_a_lost_pointer_makes_no_new_run(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole / "run", tmp_path / "run")
    (run / "checkpoints" / "latest").unlink()
    code, err = again(whole, run)
    assert code == 0 and f"latest is missing\nwarning: the newest checkpoint that verifies is taken: {NINE}" in err, err
    assert names(run) == ["latest", SIX, NINE]
    assert RunFolder(run).latest() == run / "checkpoints" / NINE
    assert story(run) == story(whole / "run")


def flip(checkpoint: Path) -> None:
    path = checkpoint / "weights-00000.safetensors"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def cut(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.json", 10)


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "ranks"),
    [
        (flip, 1),
        pytest.param(flip, 2, marks=pytest.mark.slow),
        pytest.param(cut, 1, marks=pytest.mark.slow),
        pytest.param(remove_manifest, 1, marks=pytest.mark.slow),
    ],
)
def test_of_damaged_and_whole_the_whole_one_is_taken(whole: Path, tmp_path: Path, harm: object, ranks: int) -> None:
    """The steps since then are done again, to the same end, and the damaged one is kept under another name."""
    run = shutil.copytree(whole / "run", tmp_path / "run")
    assert callable(harm)
    harm(run / "checkpoints" / NINE)
    code, err = again(whole, run, ranks)
    assert code == 0 and f"set aside as damaged-{NINE}" in err and f"verifies is taken: {SIX}" in err, err
    assert names(run) == [f"damaged-{NINE}", "latest", SIX, "step-00000009.gen-0002"]
    if ranks == 1:
        assert story(run) == story(whole / "run")


@pytest.mark.slow
def test_resume_step_goes_back_and_repeats_the_run(whole: Path, tmp_path: Path) -> None:
    """The later checkpoint stays and is named. The same command, started again as a supervisor does, goes on."""
    run = shutil.copytree(whole / "run", tmp_path / "run")
    given = (f"data.path={whole / 'data'}", "max_steps=9", *COMMON, "resume_step=6")
    [(code, err)] = finish(start(run, *given[:-1], "resume_step=7"))
    assert code == 2 and "resume_step=7" in err and "none of that step, but of steps 6, 9: give one of these" in err, (
        err
    )
    assert RunFolder(run).newest_generation() == 1, "nothing has begun"
    [(code, err)] = finish(start(run, *given))
    assert code == 0 and f"warning: {NINE}: this start does not descend from them and deletes none" in err, err
    assert names(run) == ["latest", SIX, NINE, "step-00000009.gen-0002"]
    assert RunFolder(run).latest() == run / "checkpoints" / "step-00000009.gen-0002"
    assert story(run) == story(whole / "run")
    lines = told(run, *given)
    assert any("gone back to it, and goes on from step-00000009.gen-0002; to go back once" in line for line in lines)
    assert not any(line.startswith("changed:") for line in lines)


def hashed(argv: list[str]) -> dict[str, int]:
    """On a rank: the bytes of each file of a checkpoint that a run compares with its checksum."""
    digest, found = hashlib.file_digest, dict[str, int]()

    def counted(file: Any, name: str) -> Any:
        path = Path(file.name)
        if path.parent.name.startswith("step-"):
            found[path.name] = found.get(path.name, 0) + path.stat().st_size
        return digest(file, name)

    hashlib.file_digest = counted
    printed(argv)
    return found


def test_a_resume_hashes_once_and_a_profile_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """The steps 8 and 9 are traced; each file of a checkpoint that is read is hashed once, if it is not tiny."""
    run = shutil.copytree(whole / "run", tmp_path / "run")
    given = (f"run.dir={run}", f"data.path={whole / 'data'}", "max_steps=9", *COMMON, "resume_step=6", "profile=8-9")
    [bytes_of] = run_ranks(1, "tests.system.test_recovery:hashed", argv=[*TINY, *given])
    sizes = {p.name: p.stat().st_size for p in (run / "checkpoints" / SIX).iterdir()}
    assert bytes_of.pop("state.json") < 9 * sizes.pop("state.json")
    assert bytes_of == {name: size for name, size in sizes.items() if name != "manifest.json"}
    assert story(run) == story(whole / "run")
    [trace] = (run / "profile").iterdir()
    assert trace.name == "steps-8-9.gen-0002.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["name"] for e in events if str(e.get("name")).startswith("step ")} == {"step 8", "step 9"}
    assert any(e.get("name") == "aten::mm" for e in events)


@pytest.mark.parametrize("profile", ["10", "0-2", "3-2", "8-10", "1-2-3", "a-b"])
def test_a_profile_that_is_no_range_of_steps_is_refused(profile: str) -> None:
    with pytest.raises(UserError, match=f"profile={profile}: give the first and the last step, of 1 to max_steps=9"):
        load(PretrainConfig, [*TINY, "run.dir=r", "data.path=d", "max_steps=9", f"profile={profile}"])


@pytest.mark.slow
@needs_mlflow
def test_a_resumed_start_says_what_it_changes(whole: Path, tmp_path: Path) -> None:
    """In lines, and as MLflow's params of that start."""
    run, data, uri = tmp_path / "run", tmp_path / "moved", f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copytree(whole / "run", run)
    shutil.copytree(whole / "data", data)
    given = ("max_steps=10", "optim.lr=6e-3", "model.dropout=0.2", "precision=bf16", f"data.path={data}")
    lines = told(run, *COMMON[:-1], *given)
    changes = {
        "data.path": f"{whole / 'data'} -> {data}",
        "max_steps": "9 -> 10",
        "model.dropout": "0.1 -> 0.2",
        "optim.lr": "0.003 -> 0.006",
        "precision": "fp32 -> bf16",
        "run.dir": f"{whole / 'run'} -> {run}",
    }
    at = lines.index(f"changed: data.path {changes['data.path']}")
    assert lines[at : at + 6] == [f"changed: {key} {change}" for key, change in changes.items()]
    rates = {step: metrics["optim/lr"] for step, metrics in story(run) if "optim/lr" in metrics}
    assert lines[at + 6].startswith(f"the learning rate of step 10 is {rates[10]:.2e}; unchanged it would be ")
    code, told_of_it = sync(run, f"uri={uri}")
    assert code == 0
    params = client_of(uri).get_run(told_of_it["run_id"]).data.params
    assert {key: value for key, value in params.items() if key.startswith("start.")} == {
        f"start.2.{key}": change for key, change in changes.items()
    }


@pytest.mark.slow
def test_no_whole_checkpoint_starts_nothing(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole / "run", tmp_path / "run")
    for name in (SIX, NINE):
        flip(run / "checkpoints" / name)
    before = names(run)
    code, err = again(whole, run)
    assert code == 2 and "none of its checkpoints is whole" in err and "weights-00000.safetensors" in err, err
    assert names(run) == before


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_version_is_refused(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole / "run", tmp_path / "run")
    path = run / "checkpoints" / NINE / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    code, err = again(whole, run)
    assert code == 2 and "made by a newer version of Gradus (format 2, this one reads 1)" in err, err
    assert names(run) == ["latest", SIX, NINE]


def test_a_source_without_validation_data_trains(whole: Path, tmp_path: Path) -> None:
    """With eval.every=0; any other number is refused, and the line names it."""
    shutil.copytree(whole / "data" / "train", tmp_path / "data" / "train")
    given = (f"data.path={tmp_path / 'data'}", "max_steps=2")
    pretrain(tmp_path / "run", *given)
    assert [sorted(metrics) for _, metrics in story(tmp_path / "run") if "val/loss" in metrics] == []
    [(code, err)] = finish(start(tmp_path / "run", *given, "eval.every=1"))
    assert code == 2 and "eval.every=1, but no source has validation data" in err and "eval.every=0" in err, err
