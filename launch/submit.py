"""Entry: `python -m launch.submit cluster=slurm run.name=x cluster.nodes=2 -- experiment=gpt2_small_webtext`.

What follows `--` is the command line of trainer.pretrain. All that its ranks would refuse, and a model that does not
fit, is refused here, without torch. The config and the code's version are frozen in run.dir/submit/0001, so that what
runs is what was checked, even if conf/ is changed later. docs/launch.md is the page on it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from conf.environment import passed_on
from conf.errors import UserError
from conf.frozen import freeze, literal
from conf.schema import load, run, tell_twice
from data_pipeline.config import DataConfig
from data_pipeline.files import publish, publish_json, read_json
from data_pipeline.remote.backends import shown
from launch import local
from launch.cluster_config import ClusterConfig
from launch.config import SubmitConfig
from launch.job import SUBMITTED, Job
from launch.preflight import alive, preflight, queued
from launch.slurm import launcher as slurm
from launch.ssh import launcher as ssh
from trainer.config.pretrain import PretrainConfig
from trainer.run.code_version import code_version
from trainer.run.folder import RunFolder
from trainer.run.redact import redact_command, refuse_secrets

LAUNCHERS = {"slurm": slurm, "ssh": ssh, "local": local}  # by the section of cluster that asks for it
OURS = ("run", "run.name", "run.dir")  # given left of the --


def submit(cfg: SubmitConfig, overrides: list[str], argv: list[str]) -> int:
    """The exit code of the run; 0 if it was handed to Slurm, or not started.

    Raises:
        UserError: a run or a cluster that cannot be; then nothing is started and nothing written.
    """
    prepare = LAUNCHERS[launcher_of(cfg.cluster)].prepare
    check_forward(cfg.cluster)
    refuse_secrets(asdict(cfg))
    run_dir = Path(cfg.run.dir).absolute()
    runs, said = [], []
    for i, (name, path, given) in enumerate(elements(cfg, run_dir, overrides)):
        try:
            own = [f"run.name={literal(name)}", f"run.dir={literal(str(path))}"]
            wanted = load(PretrainConfig, [*given, *own])
            if cfg.dry_run:
                refuse_commands(wanted.data)
            one, lines = preflight(wanted, cfg.cluster)
        except UserError as e:
            raise (type(e)(f"sweep[{i}]: {e}") if cfg.sweep else e) from None
        runs.append(one)
        said += [*lines, *filter(None, [alive(path), queued(path)])]
    print("\n".join(said), flush=True)
    submissions = RunFolder(run_dir).submissions
    made = [path for path in (submissions, *submissions.parents) if not path.exists()]
    allow_pipe = any(one.data.allow_pipe for one in runs)
    run_dirs = [Path(one.run.dir) for one in runs]
    job = write(cfg, run_dir, [freeze(one) for one in runs], run_dirs, argv, allow_pipe)
    try:
        commands = prepare(job)
    except BaseException:  # a refusal: the folder of what was never started would only confuse
        shutil.rmtree(job.folder)
        with suppress(OSError):  # something else has come to lie there
            for path in made:
                path.rmdir()
        raise
    folders = [job.folder, *elements_folders(job)]
    print(f"frozen: {job.folder}")
    print("\n".join(map(shlex.join, commands)), flush=True)
    if cfg.dry_run:
        return 0
    if cfg.cluster.slurm is not None:
        jobs = slurm.submit(commands)
        record(folders, commands, jobs)
        print(f"output: {slurm.output(job)}")
        print(f"submitted: {', '.join(jobs)}")
        return 0
    record(folders, commands, [])
    return foreground(commands, job.cwd)


def launcher_of(cluster: ClusterConfig) -> str:
    """Raises UserError if the cluster is started in no way, or in several."""
    sections = [name for name in LAUNCHERS if getattr(cluster, name) is not None]
    if len(sections) != 1:
        how = " and ".join(f"cluster.{name}" for name in sections) or "no way to start a run"
        raise UserError(
            f"cluster={cluster.name} has {how}: "
            "give cluster=slurm, cluster=ssh or cluster=local, and single values as cluster.KEY=VALUE"
        )
    return sections[0]


def check_forward(cluster: ClusterConfig) -> None:
    """Raises UserError if there is nothing to forward under a name."""
    missing = [name for name in cluster.forward if name not in os.environ]
    if missing:
        raise UserError(f"cluster.forward names {missing[0]}, which is not in your environment: export it first")


def refuse_commands(data: DataConfig) -> None:
    """Raises UserError if the sources cannot be checked without running a command, as a dry run has to."""
    if data.pipes:
        raise UserError(
            f"dry_run=true runs no command, and data.sources.{data.pipes[0]} is one, "
            f"{shown(data.location(data.pipes[0], 'train'))}: leave dry_run out, or give its path or URL"
        )


def elements(cfg: SubmitConfig, run_dir: Path, overrides: list[str]) -> list[tuple[str, Path, list[str]]]:
    """run.name, run.dir and the overrides of each run: one, or those of the sweep, numbered.

    Raises:
        UserError: an override that is to stand left of the --.
    """
    for text in [*overrides, *(text for own in cfg.sweep for text in own)]:
        if text.partition("=")[0] in OURS:
            raise UserError(f"{text}: give run.name and run.dir left of the --; runs of a sweep get a number each")
    if not cfg.sweep:
        return [(cfg.run.name, run_dir, overrides)]
    numbered = enumerate(cfg.sweep)
    return [(f"{cfg.run.name}-{i}", Path(f"{run_dir}-{i}"), [*overrides, *own]) for i, own in numbered]


def write(
    cfg: SubmitConfig, run_dir: Path, frozen: list[str], run_dirs: list[Path], argv: list[str], allow_pipe: bool
) -> Job:
    """Write the frozen configs, one for each of `run_dirs`, and the code's version into a new folder of the run."""
    try:
        texts = [text.encode() for text in frozen]
        submitted = freeze(cfg).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"a value is not UTF-8 text ({e.reason}): rename what it names") from None
    version, patch = code_version()
    folder = RunFolder(run_dir).take_submission()
    names = [f"config-{i}.yaml" for i in range(len(texts))] if cfg.sweep else ["config.yaml"]
    for name, text in zip(names, texts, strict=True):
        publish(folder / name, text)
    publish(folder / "submit.yaml", submitted)
    code: dict[str, Any] = {"argv": redact_command(argv), "host": socket.gethostname(), "time": time.time(), **version}
    code |= {"runs": [str(path) for path in run_dirs]} if cfg.sweep else {}
    publish_json(folder / "code.json", code, private=True)
    if patch:
        publish(folder / "code.patch", patch, private=True)
    return Job(
        name=cfg.run.name,
        run_dir=run_dir,
        folder=folder,
        configs=tuple(folder / name for name in names),
        run_dirs=tuple(run_dirs),
        cluster=cfg.cluster,
        python=sys.executable,
        cwd=Path.cwd(),
        max_restarts=cfg.max_restarts,
        allow_pipe=allow_pipe,
    )


def elements_folders(job: Job) -> list[Path]:
    """A submission in the folder of each run of a sweep, which says where all of it lies; [] without a sweep."""
    others = [path for path in job.run_dirs if path != job.run_dir]
    code = {k: v for k, v in read_json(job.folder / "code.json", "submit it again").items() if k != "runs"}
    folders = [RunFolder(path).take_submission() for path in others]
    for folder in folders:
        publish_json(folder / "code.json", {**code, "folder": str(job.folder)}, private=True)
    return folders


def record(folders: list[Path], commands: list[list[str]], jobs: list[str]) -> None:
    """Record that it was started: a submission without this file was a dry run. `jobs`: Slurm's ids."""
    body = {"jobs": jobs, "commands": [redact_command(command) for command in commands], "time": time.time()}
    for folder in folders:
        publish_json(folder / SUBMITTED, body)


def foreground(commands: list[list[str]], cwd: Path) -> int:
    """Run the commands one after the other; the exit code of the first that failed, else 0.

    SIGINT, SIGTERM and SIGUSR1 go on to the one that runs, SIGHUP (a closed terminal) as SIGTERM, unless it is ignored
    (nohup); no other is started after it.
    """
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        received.append(number)
        if process is not None and process.returncode is None:
            process.send_signal(number)

    env = passed_on()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    failed = 0
    for command in commands:
        if received:
            return failed or 128 + received[0]
        process = subprocess.Popen(command, cwd=cwd, env=env, process_group=0)  # a terminal's ^C comes once, through us
        if received:  # it came while there was nobody to tell
            process.send_signal(received[-1])
        code = process.wait()
        failed = failed or (code if code >= 0 else 128 - code)
    return failed


def main() -> None:
    argv = list(sys.argv)
    split = argv.index("--") if "--" in argv else len(argv)
    sys.argv, overrides = argv[:split], argv[split + 1 :]

    def started(cfg: SubmitConfig) -> None:
        if split == len(argv):
            raise UserError("what to train is not given: end the line with -- and trainer.pretrain's own overrides")
        tell_twice(overrides)
        sys.exit(submit(cfg, overrides, argv))

    run(SubmitConfig, started)


if __name__ == "__main__":
    main()
