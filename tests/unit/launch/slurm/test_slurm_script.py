"""The sbatch script: what a user says is data in it, or refused; and what it does when the run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.errors import TransientError, UserError
from conf.schema import load
from launch.cluster_config import Chain, ClusterConfig, SlurmConfig, seconds
from launch.config import SubmitConfig
from launch.job import Job, rank_arguments, supervised
from launch.slurm.launcher import PREVIOUS, prepare, render, srun, submit

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
HOSTILE = ["$(touch hit)", "`touch hit`", "a'b\"c", "; touch hit #", "${x}", "a b", "~", "*", "-x", "\\", "!!", "é“”’"]
STUB = f"""#!{sys.executable}
import json, os, signal, sys, time
print(json.dumps([sys.argv[1:], dict(os.environ)]), flush=True)
if "WAIT" in os.environ:
    signal.signal(int(os.environ["WAIT"]), lambda *_: sys.exit(int(os.environ["CODE"])))
    print("waits", flush=True)
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", "0")))
"""


def job(root: Path, n: int = 1, env: dict[str, str] | None = None, name: str = "run", **slurm: Any) -> Job:
    """Of n runs; its Python is a program that prints its words and environment as JSON and ends with CODE."""
    folder = root / "submit" / "0001"
    folder.mkdir(parents=True, exist_ok=True)
    python = root / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    cluster = ClusterConfig(name="x", network_gbit=1, gpu="cpu", env=env or {}, slurm=SlurmConfig(**slurm))
    dirs = tuple(root / f"run{i}" for i in range(n))
    configs = tuple(folder / f"config-{i}.yaml" for i in range(n))
    return Job(name, root, folder, configs, dirs, cluster, str(python), root, 3)


def bash(job: Job, *words: str, **env: str) -> subprocess.Popen[str]:
    """Runs the script as Slurm would, with a scontrol that says what it is asked."""
    script, scontrol = job.folder / "script", job.folder / "scontrol"
    script.write_text(render(job))
    scontrol.write_text('#!/bin/sh\necho "scontrol $*"\ntest -z "$refuses"\n')
    scontrol.chmod(0o755)
    env = {"PATH": f"{job.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"} | env
    return subprocess.Popen(
        ["bash", str(script), *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def seen(job: Job, **env: str) -> tuple[list[str], dict[str, str]]:
    out, _ = bash(job, **env).communicate(timeout=300)
    words, environ = json.loads(out.splitlines()[1])
    return words, environ


def test_every_value_reaches_the_command_as_it_was_said(tmp_path: Path) -> None:
    for i, text in enumerate([*HOSTILE, "line\nbreak"]):
        root = tmp_path / f"{i} {text}"
        made = job(root, 2, {"ENV": text})
        for element in range(2):
            words, env = seen(made, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(element))
            assert [made.python, *words] == supervised(made, element, srun(made, element)), text
            assert env["ENV"] == text and env["DS_ACCELERATOR"] == "cpu"
    assert not list(tmp_path.rglob("hit"))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, value=TEXT)
def test_any_text_stays_data_for_bash(text: str, value: str, tmp_path: Path) -> None:
    made = replace(job(tmp_path, env={"ENV": value}), configs=(tmp_path / text.replace("/", "x"),))
    words, env = seen(made)
    assert words[-1] == rank_arguments(made, 0)[-1] and env["ENV"] == value


FULL = {
    "partition": "gpu,gpu-long",
    "account": "proj@a",
    "qos": "high",
    "time": "2-12:30",
    "exclusive": True,
    "cpus_per_task": 8,
    "mem": "0",
    "constraint": "[ib|eth]&h100*2",
    "reservation": "week-1",
    "exclude": ["n3", "n-4.site"],
    "modules": ["cuda/12.4", "gcc"],
    "options": {"comment": 'it\'s "a" #1 $(touch hit)\\', "nice": "100", "spread-job": ""},
    "prologue": ["conda activate x"],
}
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (3, {}),
    (1, FULL),
    (2, FULL | {"requeue": False}),
    (2, {"array_limit": 1, "prologue": ["if true; then", "  export x=1", "fi"]}),
    (1, {"chain": 3}),
    (1, {"chain": 3, "chain_by": Chain.afterok, "requeue": False}),
    (2, {"container": "docker://reg#a/b:1", "container_mounts": ["/data:/data:ro"], "container_python": "py 3"}),
]


@pytest.mark.parametrize("hostile", ["plain", *HOSTILE])
def test_bash_and_shellcheck_find_nothing_amiss(hostile: str, tmp_path: Path) -> None:
    scripts = []
    for i, (n, slurm) in enumerate(CASES):
        made = job(tmp_path / hostile, n, {"A": hostile, "B": "line\nbreak"}, hostile, **slurm)
        made = replace(made, python=f"/opt/{hostile}/python")
        scripts.append(tmp_path / f"{i}.sbatch")
        scripts[-1].write_text(render(made))
        subprocess.run(["bash", "-n", scripts[-1]], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here (apt-get install shellcheck): bash -n alone has looked")
    guesses = ["--exclude=SC1003,SC1110,SC1111,SC1112"] if hostile != "plain" else []  # what quoted text is meant for
    done = subprocess.run(["shellcheck", *guesses, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_lines_for_sbatch_say_all_that_was_given(tmp_path: Path) -> None:
    given = job(tmp_path, 2, **FULL)
    made = replace(given, cluster=replace(given.cluster, nodes=4, gpus_per_node=8, gpu="h100_80gb"))
    script = render(made)
    assert script.startswith("#!/bin/bash -l\n")
    assert [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")] == [
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=gpu,gpu-long",
        "--account=proj@a",
        "--qos=high",
        "--time=2-12:30",
        "--cpus-per-task=8",
        "--mem=0",
        "--constraint=[ib|eth]&h100*2",
        "--reservation=week-1",
        "--exclude=n3,n-4.site",
        "--exclusive",
        "--array=0-1",
        '--comment="it\'s \\"a\\" #1 $(touch hit)\\\\"',
        "--nice=100",
        "--spread-job",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
    ]
    assert "\nmodule load cuda/12.4 || exit 1\nmodule load gcc || exit 1\n" in script
    assert "|| exit 1\n\n# cluster.slurm.prologue" in script and "\nconda activate x\n" in script
    assert "DS_ACCELERATOR" not in script and "\nexport OMP_NUM_THREADS=8\n" in script
    assert (
        "srun --label --export=ALL --mpi=none --distribution=block --kill-on-bad-exit=0 --wait=60 --cpus-per-task=8 "
        in script
    )
    assert script.count("srun ") == 2, "one step for each run of the sweep"


def test_a_container_sees_the_checkout_the_run_and_its_mounts(tmp_path: Path) -> None:
    made = job(tmp_path, 2, container="img.sqsh", container_mounts=["/data:/mnt:ro"], container_python="/env/python")
    made = replace(made, cwd=Path("/checkout"))
    words = srun(made, 1)
    at = words.index("--container-image=img.sqsh")
    assert words[at + 1 :] == [
        f"--container-mounts=/checkout:/checkout,{tmp_path}:{tmp_path},{made.folder}:{made.folder},/data:/mnt:ro",
        "--container-workdir=/checkout",
        *("/env/python", "-m", "launch.slurm.rendezvous", "--", "/env/python", *rank_arguments(made, 1)),
    ]
    with pytest.raises(UserError, match="a container's mounts cannot hold , or :"):
        prepare(replace(made, run_dirs=(Path("/a,b"), Path("/c"))))


BAD = ["a\nb", "a b", "$(touch x)", "`x`", "a'b", 'a"b', "a;b", "#", "", "a\\b", "é"]


@pytest.mark.parametrize("key", ["partition", "account", "qos", "time", "mem", "constraint", "reservation"])
@pytest.mark.parametrize("value", BAD)
def test_what_slurm_could_take_for_something_else_is_refused(key: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        SlurmConfig(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"cluster.slurm.{key}: {value!r}: give ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modules": ["cuda", "-x"]}, "cluster.slurm.modules: '-x': give names"),
        ({"modules": ["a b"]}, "cluster.slurm.modules: 'a b'"),
        ({"container_mounts": ["/a:/b,/c:/d"]}, "cluster.slurm.container_mounts: '/a:/b,/c:/d'"),
        ({"time": "1:2:3:4"}, "cluster.slurm.time: '1:2:3:4': give minutes, M:S"),
        ({"cpus_per_task": 0}, "cluster.slurm.cpus_per_task=0: give 1 to"),
        ({"signal_s": 0}, "cluster.slurm.signal_s=0: give 1 to 65535"),
        ({"chain": 0}, "cluster.slurm.chain=0: give 1 to"),
        ({"exclude": ["n1", "n[2-3]"]}, "cluster.slurm.exclude: 'n[2-3]': give names of hosts"),
        ({"options": {"partition": "x"}}, "cluster.slurm.options.partition: the job script says that itself: give "),
        ({"options": {"wrap": "ls"}}, "cluster.slurm.options.wrap: the job script says that itself: leave it out"),
        ({"options": {"--gres": "x"}}, "cluster.slurm.options.--gres: give the name of a long option of sbatch, with"),
        ({"options": {"comment": "a\n#SBATCH -x"}}, "cluster.slurm.options.comment='a\\n#SBATCH -x': give one line"),
        (
            {"options": {"dependency": "afterok:7"}, "chain": 2},
            "cluster.slurm.options.dependency and cluster.slurm.chain",
        ),
        ({"prologue": [" "]}, "cluster.slurm.prologue: ' ' is no line of a shell"),
        ({"array_limit": 0}, "cluster.slurm.array_limit=0: give 1 to"),
        ({"container": ""}, "cluster.slurm.container: '': give an image, or null"),
        ({"container": "img", "container_python": ""}, "cluster.slurm.container_python: ''"),
        ({"time": "3"}, "cluster.slurm.time=3 is 180 s and signal_s=120, a signal that may come 60 s early: the job"),
    ],
)
def test_a_mistake_is_refused_with_its_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        SlurmConfig(**given)
    assert str(caught.value).startswith(message)


def gpus(options: dict[str, str], ranks: int = 4) -> ClusterConfig:
    return ClusterConfig("x", gpus_per_node=ranks, gpu="a100_80gb", network_gbit=1, slurm=SlurmConfig(options=options))


def test_an_option_that_asks_for_gpus_replaces_our_own(tmp_path: Path) -> None:
    given = {"gpu:a100:4": True, "gpu:4,lustre:1": True, "lustre:1": False}
    for gres, replaces in given.items():
        script = render(replace(job(tmp_path), cluster=gpus({"gres": gres})))
        assert f"\n#SBATCH --gres={gres}\n" in script and ("--gpus-per-node" not in script) == replaces, gres
    assert "\n#SBATCH --gpus-per-node=a100:4\n" in render(
        replace(job(tmp_path), cluster=gpus({"gpus-per-node": "a100:4"}))
    )
    with pytest.raises(
        UserError, match=r"^cluster.slurm.options.gres=gpu:a100:8 and cluster.gpus_per_node=4: a node has"
    ):
        gpus({"gres": "gpu:a100:8"})


def test_options_come_from_the_command_line_as_they_are() -> None:
    words = ["run.name=x", "cluster=slurm", "cluster.gpus_per_node=4", "cluster.slurm.options.mail-user=a@b.c"]
    words += ["cluster.slurm.options.gres='gpu:a100:4'", "cluster.slurm.prologue=['module load x || exit 1']"]
    slurm = load(SubmitConfig, words).cluster.slurm
    assert slurm is not None and slurm.prologue == ["module load x || exit 1"]
    assert slurm.options == {"mail-user": "a@b.c", "gres": "gpu:a100:4"}
    braces = load(SubmitConfig, [*words[:3], "cluster.slurm.options={gres: gpu:a100:4, nice: '5'}"]).cluster.slurm
    assert braces is not None and braces.options == {"gres": "gpu:a100:4", "nice": "5"}


def test_slurms_times_in_seconds() -> None:
    given = {"30": 1800, "1:30": 90, "1:00:01": 3601, "1-0": 86400, "1-1:1": 90060, "2-01:00:05": 176405}
    assert {text: seconds(text) for text in given} == given


def test_names_and_paths_are_words_of_sbatch(tmp_path: Path) -> None:
    made = job(tmp_path / "100% $(x)", name="my 'run' %j")
    [words] = prepare(made)
    escaped = str(made.folder).replace("%", "%%")
    assert words[:1] == ["sbatch"] and words[-1] == str(made.folder / "job.sbatch")
    assert "--job-name=my 'run' %j" in words and f"--output={escaped}/slurm-%j.out" in words
    assert (made.folder / "job.sbatch").read_text() == render(made)
    [words] = prepare(job(tmp_path / "sweep", 2))
    assert words[-2].endswith("/slurm-%A_%a.out")
    for name, path in (("a\nb", "x"), ("a\x1bb", "x"), ("a", "x\ny"), ("a", "x\\y")):
        with pytest.raises(UserError, match=r"^run\.(name|dir)=.*Slurm takes no line breaks"):
            prepare(job(tmp_path / path, name=name))


def test_a_chain_is_one_command_for_each_job(tmp_path: Path) -> None:
    singles = prepare(job(tmp_path, chain=3))
    assert [words[-1] for words in singles] == ["1", "2", "3"]
    assert all("--dependency=singleton" in words for words in singles)
    first, *others = prepare(job(tmp_path, chain=3, chain_by=Chain.afterok))
    assert not any(word.startswith("--dependency") for word in first)
    assert all(f"--dependency=afterok:{PREVIOUS}" in words for words in others)
    with pytest.raises(UserError, match=r"cluster\.slurm\.chain=2 and a sweep of 3 runs"):
        prepare(job(tmp_path, 3, chain=2))


@pytest.mark.parametrize(
    ("code", "slurm", "words", "ends", "asks"),
    [
        (0, {}, [], 0, None),
        (1, {}, [], 1, None),
        (2, {}, [], 2, None),
        (85, {}, [], 85, "7"),
        (143, {}, [], 143, None),
        (85, {"requeue": False}, [], 85, None),
        (85, {"chain": 2}, ["1"], 0, None),
        (85, {"chain": 2}, ["2"], 85, "7"),
        (1, {"chain": 2}, ["1"], 1, None),
    ],
)
def test_only_a_run_that_was_stopped_goes_on(
    code: int, slurm: dict[str, Any], words: list[str], ends: int, asks: str | None, tmp_path: Path
) -> None:
    process = bash(job(tmp_path, **slurm), *words, CODE=str(code))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == ends
    assert [line for line in out.splitlines() if line.startswith("scontrol")] == [f"scontrol requeue {asks}"] * bool(
        asks
    )


@pytest.mark.parametrize(("n", "given"), [(1, {}), (1, {"requeue": False}), (1, {"chain": 2}), (2, {})])
def test_a_job_that_does_not_come_back_says_what_to_run(n: int, given: dict[str, Any], tmp_path: Path) -> None:
    """A site may refuse to requeue: the run is saved, and one line has the command that goes on."""
    made = job(tmp_path, n, name="it's a run", **given)
    env = {"CODE": "85", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    (made.folder / "sbatch").write_text('#!/bin/sh\nfor word; do echo "word: $word"; done\n')
    (made.folder / "sbatch").chmod(0o755)
    process = bash(made, "2", refuses="yes", **env)
    _, err = process.communicate(timeout=300)
    [line] = [line for line in err.splitlines() if "does not come back" in line]
    path = f"{made.folder}:{os.environ['PATH']}"
    said = subprocess.run(
        ["bash", "-c", line.partition(", run: ")[2]], env={"PATH": path}, capture_output=True, text=True
    )
    words = [text.removeprefix("word: ") for text in said.stdout.splitlines()]
    assert process.returncode == 85 and f"--job-name={made.name}" in words, (line, said)
    last = [str(made.folder / "job.sbatch"), *(["2"] if "chain" in given else [])]
    assert words[-len(last) :] == last and ("--array=1" in words) == (n > 1)


def test_an_element_of_a_sweep_asks_for_itself_alone(tmp_path: Path) -> None:
    process = bash(job(tmp_path, 2), CODE="85", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert "scontrol requeue 7_1\n" in process.communicate(timeout=300)[0]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_run_and_the_script_waits(number: signal.Signals, tmp_path: Path) -> None:
    """The script ends after the run."""
    process = bash(job(tmp_path), CODE="85", WAIT=str(int(number)))
    assert process.stdout is not None
    while process.stdout.readline() != "waits\n":
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 85 and "scontrol requeue 7\n" in out
    assert f": {number.name}\n" in out and ": exit code 85\n" in out


def test_where_sbatch_is_absent_or_refuses_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    commands = prepare(job(tmp_path / "run", chain=2, chain_by=Chain.afterok))
    with pytest.raises(UserError, match=r"^no sbatch here"):
        submit(commands)
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/sh\ncase "$*" in *afterok:7*) echo full >&2; exit 1;; *) echo "7;site";; esac\n')
    fake.chmod(0o755)
    with pytest.raises(TransientError, match=r"^sbatch ended with 1: full \(submitted before it: 7\)$"):
        submit(commands)


def test_the_submitters_environment_does_not_overrule_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = tmp_path / "sbatch"
    fake.write_text(f'#!/bin/sh\n/usr/bin/env > "{tmp_path}/seen"\necho 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    overrule = ["SBATCH_ARRAY_INX", "SBATCH_NO_REQUEUE", "SBATCH_PARTITION", "SBATCH_SIGNAL", "SBATCH_TIMELIMIT"]
    for name in (*overrule, "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "other")
    assert submit(prepare(job(tmp_path / "run", partition="gpu", time="1-0"))) == ["7"]
    seen = [line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("SBATCH_")]
    assert seen == ["SBATCH_ACCOUNT=other"], "of which the script says nothing"
    assert capsys.readouterr().err == f"ignored, the job script says it itself: {', '.join(overrule)}\n"


def test_no_name_of_the_script_is_one_that_a_rank_may_get(tmp_path: Path) -> None:
    names = dict.fromkeys(("job", "child", "code", "command"), "kept")
    _, env = seen(job(tmp_path, env=names))
    assert names.items() <= env.items()
