"""Entry: `python -m launch.doctor cluster=slurm run.dir=... -- experiment=...`: checks that a run can work here.

What follows `--` is the command line of trainer.pretrain, as for launch.submit; without it the machine alone is looked
at. One line for each check, ok, warn or fail, with what to do; exit code 1 where one fails (docs/doctor.md).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from conf.errors import UserError
from conf.frozen import literal
from conf.schema import load, run
from data_pipeline.config import DataConfig
from launch.checks import folder, hosts, packages, services, slurm
from launch.checks.nodes import examine_nodes
from launch.checks.run_checks import checkpoint_bytes, trainable
from launch.checks.runner import Check, run_checks
from launch.config import DoctorConfig
from launch.preflight import preflight
from launch.ssh.launcher import hosts_of, needed_programs
from trainer.config.pretrain import PretrainConfig
from trainer.config.tracking import TrackerName, TrackingConfig
from trainer.diagnostics import machine
from trainer.diagnostics.check_result import CheckResult, State

ROOT = Path(__file__).resolve().parent.parent
QUICK_S, DISK_S, SERVICE_S, DATA_S = 20.0, 60.0, 20.0, 120.0
DISK = "the disk hangs: look at its server (mount, df), or give another run.dir"


def look(cfg: DoctorConfig, command: list[str] | None) -> list[CheckResult]:
    """Make the checks; `command`: the words after `--`, None without them.

    Raises:
        UserError: the command line is wrong.
    """
    if cfg.node:
        if command is not None:
            raise UserError("node=true looks at nodes, not at a run: leave out -- and what follows it")
        return examine_nodes(cfg, ROOT)
    run_dir = Path(cfg.run.dir).absolute()
    if command is None:
        checks = [*machine_checks(cfg.tracking.uri is not None), *cluster_checks(cfg)]
        checks.append(folder_check(run_dir, None, cfg.cluster.nodes))
        if cfg.tracking.uri is not None:
            checks.append(tracking_check(TrackingConfig(TrackerName.mlflow, cfg.tracking.uri), run_dir))
        if cfg.data.path is not None:
            named = load(PretrainConfig, [f"data.path={literal(cfg.data.path)}", "max_steps=1"])
            checks.append(data_check(named.data))
        return run_checks(checks)
    train = pretrain_config(cfg, command, run_dir)
    trained = one(partial(trainable, partial(preflight, train, cfg.cluster)))
    return run_checks(
        [
            *machine_checks(train.tracking.name is TrackerName.mlflow),
            *cluster_checks(cfg),
            folder_check(run_dir, checkpoint_bytes(train.model, train.checkpoint), cfg.cluster.nodes),
            tracking_check(train.tracking, run_dir),
            data_check(train.data),
            Check("run", trained, DATA_S, "look at data.path and run.dir"),
        ]
    )


def pretrain_config(cfg: DoctorConfig, command: list[str], run_dir: Path) -> PretrainConfig:
    """The config of the given run, in the run folder left of the `--`, as in launch.submit."""
    for key, value in (("data.path", cfg.data.path), ("tracking.uri", cfg.tracking.uri)):
        if value is not None:
            raise UserError(f"{key}={value}: a run is given: give it after the --")
    own = [f"run.name={literal(cfg.run.name)}", f"run.dir={literal(str(run_dir))}"]
    return load(PretrainConfig, [*command, *own])


def machine_checks(tracked: bool) -> list[Check]:
    extras = ("tracking",) if tracked else ()
    return [
        Check("python", one(partial(packages.python_version, ROOT)), QUICK_S),
        Check("packages", partial(packages.packages, ROOT, extras), QUICK_S),
        Check("checkout", one(partial(packages.checkout, ROOT)), QUICK_S + packages.GIT_S),
        Check("shared memory", one(machine.shared_memory), QUICK_S),
        Check("open files", one(machine.open_files), QUICK_S),
        Check("locked memory", one(machine.locked_memory), QUICK_S),
    ]


def cluster_checks(cfg: DoctorConfig) -> list[Check]:
    cluster, checks = cfg.cluster, []
    if cluster.slurm is not None:
        late = "the controller does not answer: ask the cluster's administrators"
        checks += [
            Check("slurm commands", one(slurm.commands), QUICK_S),
            Check("slurm controller", one(slurm.controller), QUICK_S, late),
            Check("partition", partial(slurm.partition, cluster, cluster.slurm), QUICK_S, late),
        ]
    if cluster.ssh is not None:
        checks.append(Check("programs", one(partial(hosts.programs, needed_programs(cluster.ssh))), QUICK_S))
        checks += [
            Check(
                f"host {name}",
                one(partial(hosts.reachable, name, ROOT)),
                QUICK_S + 20,
                f"ssh {name} hangs: try it by hand",
            )
            for name in hosts_of(cluster)
        ]
    return checks


def folder_check(run_dir: Path, needed: int | None, nodes: int) -> Check:
    return Check("run.dir", partial(folder.run_folder, run_dir, needed, nodes), DISK_S, DISK)


def tracking_check(tracking: TrackingConfig, run_dir: Path) -> Check:
    return Check("tracking", one(partial(services.tracking, tracking, run_dir)), SERVICE_S)


def data_check(data: DataConfig) -> Check:
    return Check("data", partial(services.data, data), DATA_S, "look at data.path: its place hangs")


def one(function: Callable[[], CheckResult]) -> Callable[[], Iterable[CheckResult]]:
    return lambda: [function()]


def report(results: list[CheckResult], as_json: bool) -> int:
    """Print the results; returns the exit code."""
    failed = any(result.state is State.fail for result in results)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [result.as_json() for result in results]}))
    else:
        print("\n".join(map(str, results)))
    return int(failed)


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else None
    command = None if split is None else sys.argv[split + 1 :]
    sys.argv = sys.argv[:split]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was started is ended on the way
    run(DoctorConfig, lambda cfg: sys.exit(report(look(cfg, command), cfg.json)))


if __name__ == "__main__":
    main()
