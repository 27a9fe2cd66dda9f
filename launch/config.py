"""Settings of the commands that start and watch runs, with their checks. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from conf.errors import MISSING, UserError
from data_pipeline.config import DataConfig
from launch.cluster_config import ClusterConfig
from trainer.config.parallel import Open
from trainer.config.pretrain import PretrainConfig
from trainer.config.train import check_run


@dataclass
class SupervisedRunConfig:
    dir: str = MISSING  # the run.dir that the command trains in: its checkpoints are the progress that counts


@dataclass
class SuperviseConfig:
    """`python -m launch.supervise ... -- COMMAND`: start the command again when it fails."""

    run: SupervisedRunConfig = MISSING
    max_restarts: int = 3  # in a row without a new checkpoint
    backoff_s: float = 1.0  # before the first restart; doubles with each that brought no new checkpoint
    max_backoff_s: float = 60.0  # the longest wait between two starts
    grace_s: float = 30.0  # between SIGTERM and SIGKILL for processes that a failed start left behind

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise UserError(f"max_restarts={self.max_restarts}: give 0 (never restart) or more")
        if not 0 <= self.backoff_s <= self.max_backoff_s or not self.grace_s >= 0:
            raise UserError(
                f"backoff_s={self.backoff_s}, max_backoff_s={self.max_backoff_s}, grace_s={self.grace_s}: "
                "give 0 <= backoff_s <= max_backoff_s and 0 <= grace_s"
            )


@dataclass
class SubmittedRunConfig:
    name: str = MISSING  # run.name of what is started, of a sweep NAME-0, NAME-1, ...
    dir: str = MISSING  # run.dir of what is started, of a sweep DIR-0, DIR-1, ...; submit/0001 in it is made here

    def __post_init__(self) -> None:
        check_run(self.name, self.dir)


@dataclass
class SubmitConfig:
    """`python -m launch.submit ... -- OVERRIDES`: check a run, freeze it with its code version, and start it."""

    run: SubmittedRunConfig = MISSING
    cluster: ClusterConfig = MISSING
    sweep: list[list[str]] = field(default_factory=list)  # for each run of a sweep what it overrides; [] = one run
    max_restarts: int = 3  # in a row without a new checkpoint
    dry_run: bool = False  # stop when all is checked and written

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise UserError(f"max_restarts={self.max_restarts}: give 0 (never restart) or more")


@dataclass
class DoctorDataConfig:
    path: str | None = None  # data.path of the run, where no run is given behind the --


@dataclass
class DoctorTrackingConfig:
    uri: str | None = None  # tracking.uri of the run, where no run is given behind the --


@dataclass
class DoctorConfig:
    """`python -m launch.doctor ... [-- OVERRIDES]`: look at what a run needs, and say what to do."""

    run: SubmittedRunConfig = MISSING
    cluster: ClusterConfig = MISSING
    data: DoctorDataConfig = field(default_factory=DoctorDataConfig)
    tracking: DoctorTrackingConfig = field(default_factory=DoctorTrackingConfig)
    node: bool = False  # look at the nodes of this allocation, or at this machine, instead of the login node
    timeout_s: float = 60.0  # node=true: so long may ranks take to come, and each of their measurements
    json: bool = False  # print JSON instead of lines

    def __post_init__(self) -> None:
        if not 1 <= self.timeout_s < 86400:
            raise UserError(f"timeout_s={self.timeout_s}: give seconds, at least 1 and less than a day")


@dataclass
class StatusConfig:
    """`python -m launch.status`: what a run is doing, from its folder's files alone."""

    run_dir: str = MISSING  # the run.dir of a run, or a folder of such, runs for one: then a table
    json: bool = False  # print everything as one JSON object
    watch: float = 0.0  # seconds after which it is printed again; 0 = once

    def __post_init__(self) -> None:
        if not 0 <= self.watch < math.inf:
            raise UserError(f"watch={self.watch}: give seconds, or 0 to print once")


@dataclass
class CompareConfig:
    """`python -m launch.compare RUN RUN ...`: what differs between runs, from their folders' files alone."""

    output: str | None = "compare.png"  # the picture to draw; it replaces one of its own alone; null = the table alone


@dataclass
class PlanDataConfig(DataConfig):
    """The amount of data that a run trains on; a plan reads no source."""

    tokens: int | None = None  # in the whole run; null = max_steps x tokens_per_step


@dataclass
class PlanConfig(PretrainConfig):
    """`python -m launch.plan`: what a run would need and how long it would take. It takes all that pretrain takes."""

    data: PlanDataConfig = MISSING
    max_steps: Open[int] = MISSING  # null = from data.tokens
    cluster: ClusterConfig = MISSING
    json: bool = False  # print JSON with every layout instead of the table
    plot: str | None = None  # a PNG file to draw weak and strong scaling to 512 GPUs into

    def __post_init__(self) -> None:
        if self.data.tokens is not None:
            if self.data.tokens < 1:
                raise UserError(f"data.tokens={self.data.tokens}: give at least 1, or null")
            self.max_steps = -(-self.data.tokens // max(1, self.tokens_per_step))  # the course counts a ramp and stages
        if self.max_steps is None:
            raise UserError("not given: data.tokens, how many the run is to train on (or max_steps)")
        if self.gpu is not None:
            raise UserError(f"gpu={self.gpu}: a plan is for cluster.gpu={self.gpu}")
        super().__post_init__()
