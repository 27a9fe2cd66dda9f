"""launch.submit: what it refuses, in one line and before it writes; what it freezes; hostile values stay data."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.frozen import freeze, literal, thaw
from conf.schema import load
from data_pipeline.files import publish_json
from launch.config import SubmitConfig, SuperviseConfig
from launch.job import Job, rank_arguments, supervised
from launch.preflight import queued
from launch.status.report import gather
from launch.status.table import show
from launch.submit import record, submit
from tests.helpers.ranks import ROOT
from tests.system.runs import TINY, make_data
from trainer.check import check
from trainer.config.pretrain import PretrainConfig
from trainer.config.train import RunConfig
from trainer.distributed.world import World
from trainer.run import code_version
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import Heartbeat, write_heartbeat

CPU = ("cluster.gpu=cpu", "cluster.gpus_per_node=2")
HOSTILE = (
    "a b",
    'it\'s "it"',
    "$(touch x)",
    "`touch x`",
    "${oc.env:HOME}",
    "\\${x",
    "two\nlines",
    "-- x",
    "日本\x85;&|",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def dry(left: list[str], right: list[str]) -> int:
    return submit(load(SubmitConfig, [*left, "dry_run=true"]), right, [])


def trains(data: Path, *more: str) -> list[str]:
    return [*TINY, f"data.path={data}", "max_steps=8", *more]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_and_folder_reach_the_run_as_they_are(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / name
    left = [f"run.name={literal(name)}", f"run.dir={literal(str(run_dir))}", *CPU, "cluster.env.NOTE=$(touch y) '"]
    left.append("cluster.env.TOKENIZERS_PARALLELISM=false")  # no token
    assert dry(left, trains(data)) == 0
    cfg = load(PretrainConfig, [f"frozen={run_dir}/submit/0001/config.yaml"])
    assert (cfg.run, cfg.gpu, cfg.max_steps) == (RunConfig(name, str(run_dir)), "cpu", 8)
    submitted = thaw(run_dir / "submit/0001/submit.yaml", SubmitConfig)
    assert (submitted.run.name, submitted.cluster.env) == (
        name,
        {"NOTE": "$(touch y) '", "TOKENIZERS_PARALLELISM": "false"},
    )
    command = shlex.split(capsys.readouterr().out.partition("frozen: ")[2].removeprefix(str(run_dir)))
    assert command[-1] == f"frozen={run_dir}/submit/0001/config.yaml" and "NOTE=$(touch y) '" in command
    (given_dir,) = [word for word in command if word.startswith("run.dir=")]
    assert load(SuperviseConfig, [given_dir]).run.dir == str(run_dir)
    assert not (ROOT / "x").exists() and not Path("y").exists()


@pytest.mark.parametrize(
    ("left", "written"),
    [
        (["cluster=slurm", "cluster.nodes=2", "cluster.slurm.time=12:00:00", "cluster.slurm.chain=2"], "job.sbatch"),
        (["cluster=ssh", "cluster.nodes=2", "cluster.ssh.hosts=[n1,n2]"], "hostfile"),
    ],
    ids=["slurm", "ssh"],
)
def test_the_launchers_of_a_cluster_prepare_what_is_submitted(
    left: list[str], written: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a $(touch x) run"
    right = trains(data, "tokens_per_step=1024", "micro_batch_size=1")
    assert dry([*left, "cluster.gpu=cpu", "cluster.gpus_per_node=2", "run.name=it's", f"run.dir={run_dir}"], right) == 0
    assert (run_dir / "submit/0001" / written).is_file()
    assert "4 ranks" in capsys.readouterr().out


REFUSED = [
    # left of the --, right of it, the line
    ([], ["run.name=x"], "run.name=x: give run.name and run.dir left of the --"),
    ([], ["run={dir: y}"], "run={dir: y}: give run.name and run.dir left of the --"),
    (["sweep=[['run.dir=y']]"], [], "run.dir=y: give run.name and run.dir left of the --"),
    ([], ["parallel.tp=3"], "parallel.tp=3 does not divide the 2 ranks"),
    ([], ["data.lanes=3"], "tokens_per_step=512"),
    ([], ["data.path=absent"], "data.sources.shards: "),
    ([], ["tracking=mlflow", "tracking.uri=nowhere"], "tracking.uri=nowhere has no scheme"),
    ([], ["resume=must"], "resume=must, but "),
    ([], ["max_stps=3"], "max_stps: no such key (did you mean max_steps?)"),
    ([], ["frozen=x"], "frozen=x is the whole config: give nothing else"),
    ([], ["gpu=h100_80gb"], "gpu=h100_80gb, but cluster.gpu=cpu: leave gpu out"),
    (["cluster.gpu=k80"], [], "cluster.gpu=k80: give one of "),
    (["sweep=[['seed=1'],['optim.lr=fast']]"], [], "sweep[1]: optim.lr=fast: give a number"),
    (["cluster.nodes=2"], [], "cluster.nodes=2 with cluster=local, which is one machine: give cluster=ssh"),
    (
        ["cluster=infiniband"],
        [],
        "cluster=infiniband has no way to start a run: give cluster=slurm, cluster=ssh or cluster=local",
    ),
    (["cluster=slurm", "cluster.slurm.partition=$(x)"], [], "cluster.slurm.partition: '$(x)': give names"),
    (["cluster=ssh"], [], "cluster.ssh"),
    (["cluster.slurm.time=10"], [], "cluster=local has cluster.slurm and cluster.local: give cluster=slurm"),
    (["cluster.env.HF_TOKEN=abc"], [], "cluster.env.HF_TOKEN looks like a secret"),
    (["cluster.env.DB_PWD=abc"], [], "cluster.env.DB_PWD looks like a secret"),
    (["cluster.env.TRACK=https://me:abc@h"], [], "cluster.env.TRACK looks like a secret, which the run folder would"),
    (["cluster.env={1A: x}"], [], "cluster.env: '1A' is no variable"),
    (["cluster.forward=['A B']"], [], "cluster.forward: 'A B': give names of variables"),
    (["cluster.forward=[SLURM_CPU_BIND]"], [], "cluster.forward: SLURM_CPU_BIND is of the allocation that you are in"),
    (["cluster.forward=[NOT_SET_ANYWHERE]"], [], "cluster.forward names NOT_SET_ANYWHERE, which is not in your env"),
    (["run.name="], [], "run.name is empty"),
    (["run.name=."], [], "run.name='.' names a folder in runs/: give one without / in front and without . or .."),
    (["run.name=a/../../x"], [], "run.name='a/../../x' names a folder in runs/"),
    (["run.name=/x"], [], "run.name='/x' names a folder in runs/"),
    (["run.name=x", "run.dir="], [], "run.dir is empty"),
    (["run.name='curl -u me:abc h'"], [], "run.name holds what looks like a password, a token or a key"),
    (["max_restarts=-1"], [], "max_restarts=-1: give 0 (never restart) or more"),
]


@pytest.mark.parametrize(("left", "right", "line"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_mistake_is_one_line_and_nothing_is_written(
    left: list[str], right: list[str], line: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        dry([*CPU, f"run.dir={tmp_path}/run", *left], trains(data, *right))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value) and "abc" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_refused_submission_takes_no_file_of_others(data: Path, tmp_path: Path) -> None:
    theirs = [tmp_path / name for name in ("run/submit/0007/notes", "run/submit/todo", "run/notes")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years")
    with pytest.raises(UserError, match=r"^cluster\.nodes=2 with cluster=local, which is one machine"):
        dry([*CPU, f"run.dir={tmp_path}/run", "cluster.nodes=2"], trains(data))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*theirs}
    assert [path.name for path in (tmp_path / "run/submit").glob("0*")] == ["0007"]


def test_what_does_not_fit_is_refused_with_the_way_out(data: Path, tmp_path: Path) -> None:
    big = trains(data, "model=gpt2_xl", "model.vocab_size=1024", "model.n_ctx=128", "precision=bf16")
    with pytest.raises(UserError, match=r"^gpt2_xl does not fit on 1 x rtx3090_24gb .*: parallel.offload=cpu"):
        dry(["cluster.gpu=rtx3090_24gb", f"run.dir={tmp_path}/run"], big)
    assert not (tmp_path / "run").exists()


def test_the_plan_is_of_the_cluster_and_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = ["cluster.gpu=a100_80gb", "cluster.gpus_per_node=4", f"run.dir={tmp_path}/run"]
    dry(left, trains(data, "parallel=auto", "micro_batch_size=auto", "precision=bf16"))
    said = capsys.readouterr().out
    assert "4 x a100_80gb" in said and "GiB a rank" in said and "tokens/s" in said and "USD" in said
    cfg = load(PretrainConfig, [f"frozen={tmp_path}/run/submit/0001/config.yaml"])
    assert (cfg.gpu, cfg.parallel.tp, cfg.micro_batch_size) == ("a100_80gb", None, "auto")  # each start may differ


def test_a_sweep_freezes_each_run_by_itself(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = [*CPU, "run.name=s", f"run.dir={tmp_path}/s", "sweep=[['optim.lr=1e-3'],['optim.lr=2e-3','seed=5']]"]
    dry(left, trains(data, "seed=4"))
    runs = [load(PretrainConfig, [f"frozen={tmp_path}/s/submit/0001/config-{i}.yaml"]) for i in (0, 1)]
    assert [(r.run.name, r.run.dir, r.optim.lr, r.seed) for r in runs] == [
        ("s-0", f"{tmp_path}/s-0", 1e-3, 4),
        ("s-1", f"{tmp_path}/s-1", 2e-3, 5),
    ]
    assert capsys.readouterr().out.count("launch.supervise run.dir=") == 2
    for i in (0, 1):  # what a run's environment and status look for
        code = json.loads((tmp_path / f"s-{i}/submit/0001/code.json").read_text())
        assert (code["folder"], "argv" in code) == (f"{tmp_path}/s/submit/0001", True)
    text = "\n".join(show(gather(tmp_path / "s", time.time())))
    assert f"state: a sweep (its runs have folders of their own: {tmp_path}/s-0, {tmp_path}/s-1)" in text
    assert "nothing was started (a dry run)" in text


def test_a_start_is_reported_and_a_job_in_the_queue_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunFolder(tmp_path / "run").take_submission()
    publish_json(made / "code.json", {"commit": "abc", "dirty": False})
    assert "nothing was started (a dry run)" in "\n".join(show(gather(tmp_path / "run", time.time())))
    record([made], [["sbatch", "--token", "hush"]], ["17"])
    assert "hush" not in (made / "submitted.json").read_text()
    assert "commit abc, submitted 20" in (text := "\n".join(show(gather(tmp_path / "run", time.time()))))
    assert "as job 17" in text and "state: never started (submitted 1 times)" in text
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    assert queued(tmp_path / "run") is None
    for ids, warned in (("16 170", False), ("16 17", True)):
        (tmp_path / "squeue").write_text("#!/bin/sh\n" + "".join(f"echo '{i}|N/A|RUNNING|None'\n" for i in ids.split()))
        (tmp_path / "squeue").chmod(0o755)
        assert (queued(tmp_path / "run") is not None) == warned


def test_each_submission_has_a_folder_of_its_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is at work is reported."""
    folder, now = RunFolder(tmp_path / "run").heartbeats, time.time()
    folder.mkdir(parents=True)
    (folder / "rank-00000.json").write_text("[" * 5000)  # none of ours: no warning, and no end
    said = []
    for age, phase in ((None, ""), (5, "step"), (5, "end"), (300, "step")):
        if age:
            write_heartbeat(folder, Heartbeat(0, "n1", 9, 1, now - age, 3, phase, now - age, None, None))
        dry([*CPU, f"run.dir={tmp_path}/run"], trains(data))
        said.append("warning: " in capsys.readouterr().out)
    assert said == [False, True, False, False]
    assert sorted(p.name for p in (tmp_path / "run/submit").iterdir()) == ["0001", "0002", "0003", "0004"]


def test_code_is_known_by_its_commit_and_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trainer/run").mkdir(parents=True)
    here = tmp_path / "trainer/run/code_version.py"
    here.write_text("one\n")
    monkeypatch.setattr(code_version, "ROOT", tmp_path)
    monkeypatch.setattr(code_version, "__file__", str(here))
    found, patch = code_version.code_version()
    assert "not a git repository" in found["git"] and patch == b"" and found["packages"]["torch"]

    def git(*words: str) -> bytes:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, check=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    found, patch = code_version.code_version()
    assert (found["commit"], found["dirty"], patch) == (git("rev-parse", "HEAD").decode().strip(), False, b"")
    here.write_text("two\n")
    (tmp_path / "new.py").write_text("")
    found, patch = code_version.code_version()
    assert (found["dirty"], found["untracked"]) == (True, ["new.py"]) and b"-one\n+two\n" in patch
    assert "patch" not in found
    here.write_text(f'two\n# token: hf_{"aB3" * 8}\nPASSWORD = "hush"\n\xff', encoding="latin-1")
    found, patch = code_version.code_version()
    assert b'+two\n+# token: ***\n+PASSWORD = "***"\n+\xff\n' in patch
    assert found["patch"] == "cut: what looks like a secret, in 2 lines"
    monkeypatch.setattr(code_version, "MAX_PATCH", 5)
    found, patch = code_version.code_version()
    assert found["patch"].startswith("left out: ") and patch == b""


def test_the_line_needs_its_dashes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.submit", "run.name=x", f"run.dir={tmp_path}/x"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: what to train is not given: end the line with --")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
TRAPS = st.text(st.sampled_from("\\${}x'\" \n.:oc,env!&*#-0e1_n"), min_size=1)


@settings(max_examples=25, deadline=None)
@given(name=TEXT | TRAPS, path=TEXT | TRAPS)
@example(name="null", path="'${x}'")
@example(name="1e5", path="\x85\u2028\ufeff")
@example(name="!x${*", path="a${b")  # no reference at all
def test_a_frozen_config_thaws_as_it_was_whatever_its_text(name: str, path: str) -> None:
    name, path = (text.replace("???", "").replace("/", "x").replace("\0", "") + "x" for text in (name, path))
    cfg = replace(BASE, run=RunConfig(name, path))
    assert refrozen(cfg) == cfg


@settings(max_examples=12, deadline=None)
@given(text=TEXT | TRAPS)
@example(text="null")
@example(text="'\\${x'")
def test_a_literal_arrives_as_it_is(text: str) -> None:
    text = text.replace("???", "")
    assert load(SuperviseConfig, [f"run.dir={literal(text)}"]) == replace(
        SUPERVISED, run=replace(SUPERVISED.run, dir=text)
    )


BASE: PretrainConfig = load(PretrainConfig, ["data.path=d", "max_steps=5"])
SUPERVISED: SuperviseConfig = load(SuperviseConfig, ["run.dir=x"])


def refrozen(cfg: PretrainConfig) -> PretrainConfig:
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "config.yaml").write_bytes(freeze(cfg).encode())
        return load(PretrainConfig, [f"frozen={path}"])  # type: ignore[no-any-return]


DAMAGED = [
    ("max_stps: 3\n", "max_stps: Key 'max_stps' not in 'PretrainConfig'"),
    ("max_steps: a\n", "max_steps: Value 'a'"),
    ("max_steps: 3\n", "not given: checkpoint, data"),
    ("[1]\n", "not a mapping"),
    ("a: {\n", "not a frozen config: while parsing"),
    ("a: &x [1]\nb: [*x, *x]\n", "line 1: a YAML anchor or alias"),
    ("a: !!python/object/apply:os.system [ls]\n", "line 1: a YAML tag"),
    ("[" * 5000, "line 1: more than 32 levels"),
    ("x" * (2 << 20), "more than the 262144 bytes"),
    ("\xff\xfe", "not a frozen config"),
]


@pytest.mark.parametrize(("text", "line"), DAMAGED, ids=[line for _, line in DAMAGED])
def test_a_damaged_or_hostile_frozen_file_is_refused_in_one_line(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, [f"frozen={path}"])
    assert line in str(caught.value) and str(path) in str(caught.value)


def test_a_frozen_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, line in (("absent", "no such file or directory"), ("fifo", "not a regular file"), (".", "directory")):
        with pytest.raises(UserError, match=line):
            load(PretrainConfig, [f"frozen={tmp_path / name}"])


def test_nothing_is_looked_up_in_a_frozen_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "secret")
    path = tmp_path / "config.yaml"
    path.write_text(freeze(BASE).replace("runs/pretrain", '"${oc.env:PLANTED}/${run.name}"'))
    assert load(PretrainConfig, [f"frozen={path}"]).run.dir == "${oc.env:PLANTED}/${run.name}"


def test_a_command_of_a_source_runs_only_where_it_is_allowed(data: Path, tmp_path: Path) -> None:
    """Neither for a file that allows it itself nor in a dry run."""
    ran = tmp_path / "ran"
    pipe = f"pipe:sh -c 'touch {ran}; cat {data}/{{}}'"
    run = [*trains(data), f"data.sources.shards.path={literal(pipe)}", f"data.cache.dir={tmp_path / 'cache'}"]
    here = ["run.name=x", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"dry_run=true runs no command, and data.sources.shards is one, pipe:sh"):
        dry([*here, *CPU], [*run, "data.allow_pipe=true"])
    cfg = load(PretrainConfig, [*run, *here, "data.allow_pipe=true"])
    (frozen := tmp_path / "frozen.yaml").write_text(freeze(cfg))
    assert "allow_pipe: true" in frozen.read_text()
    for words in ([*run, *here], [f"frozen={frozen}"], [f"frozen={frozen}", "data.allow_pipe=false"]):
        with pytest.raises(UserError, match=r"^pipe:sh .*data.allow_pipe=true on the command line"):
            check(load(PretrainConfig, words), World(0, 1, 0, 1))
    assert not ran.exists()
    with pytest.raises(UserError, match=r"give nothing else, except data.allow_pipe=true"):
        load(PretrainConfig, [f"frozen={frozen}", "max_steps=9"])
    allowed = load(PretrainConfig, [f"frozen={frozen}", "data.allow_pipe=true"])
    assert allowed == cfg
    check(allowed, World(0, 1, 0, 1))
    assert ran.exists()


def test_a_job_starts_under_the_supervisor_by_its_frozen_config(tmp_path: Path) -> None:
    cluster = load(SubmitConfig, []).cluster
    run_dir = tmp_path / "it's"
    configs, run_dirs = (tmp_path / "0", tmp_path / "1"), (run_dir, tmp_path / "'b'")
    job = Job("n", run_dir, tmp_path, configs, run_dirs, cluster, "python", tmp_path, 7)
    assert rank_arguments(job, 1) == ["-m", "trainer.pretrain", f"frozen={tmp_path}/1"]
    assert rank_arguments(replace(job, allow_pipe=True), 1)[-2:] == [f"frozen={tmp_path}/1", "data.allow_pipe=true"]
    command = supervised(job, 0, ["L", "x"])
    assert command[:3] == ["python", "-m", "launch.supervise"] and command[-3:] == ["--", "L", "x"]
    cfg = load(SuperviseConfig, command[3:-3])
    assert (cfg.run.dir, cfg.max_restarts) == (str(run_dir), 7)
