"""Config of the data of a run, checked before any work starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from conf.errors import MISSING, UserError

IGNORE = -100  # a label that no loss counts: torch's own convention


class OnBadShard(Enum):
    stop = "stop"  # the run ends and names the shard
    skip = "skip"  # all ranks go on without it, from the same step on; the ledger says so


@dataclass
class SourceConfig:
    """One source of the mixture: a folder that `data_pipeline.shards write` made."""

    path: str = MISSING  # has train/ and perhaps val/: below data.path, or absolute, or a URL, or pipe:COMMAND {}
    weight: float = 1.0  # share of the windows, beside the other sources' weights; 0 = not drawn until a stage says so
    max_epochs: int | None = None  # refuse a run that would repeat it more often; null = repeat as needed

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"a source's weight={self.weight}: give 0 or more")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise UserError(f"a source's max_epochs={self.max_epochs}: give at least 1, or null")


@dataclass
class StageConfig:
    """Changes at a step; null = no change. Each source continues from its place."""

    step: int = MISSING  # from which on
    weights: dict[str, float] | None = None  # of the sources that change
    n_ctx: int | None = None  # at most model.n_ctx
    tokens_per_step: int | None = None  # a multiple of n_ctx times data.lanes

    def __post_init__(self) -> None:
        for key in ("n_ctx", "tokens_per_step"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"data.stages: step {self.step}: {key}={value}: give at least 1, or null for as before")
        for name, weight in (self.weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"data.stages: step {self.step}: the weight of {name} is {weight}: give 0 or more")


@dataclass
class RampConfig:
    """A batch that grows linearly with the tokens trained on, in multiples of data.lanes windows."""

    start: int | None = None  # tokens per step at first; null = no ramp
    over: int = 0  # tokens until it is full

    def __post_init__(self) -> None:
        if (self.start is None) != (self.over == 0) or (self.start or 1) < 1 or self.over < 0:
            raise UserError(
                f"batch_ramp: start={self.start} tokens per step and over={self.over} tokens go together, both positive"
            )


@dataclass
class CacheConfig:
    """The cache of each node for blocks of sources that are not local folders; its ranks share it."""

    dir: str | None = None  # a folder on a local disk; needed if a source is a URL or a pipe:
    limit_gib: float = 50.0  # the least recently used shards make room for others

    def __post_init__(self) -> None:
        if not 0 < self.limit_gib < float("inf"):
            raise UserError(f"data.cache.limit_gib={self.limit_gib}: give a number above 0")


@dataclass
class FetchConfig:
    """Time limit and retries of reads from remote sources."""

    timeout_s: float = 30.0  # within it 1 MiB must arrive, or the whole request if that is less
    retries: int = 6  # after the first try, with waits of 0.25 s, 0.5 s, 1 s, ... up to 30 s between them

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < 1e6:
            raise UserError(f"data.fetch.timeout_s={self.timeout_s}: give seconds, more than 0")
        if self.retries < 0:
            raise UserError(f"data.fetch.retries={self.retries}: give 0 or more")


@dataclass
class DataConfig:
    """The data of a run: sources and their mixture."""

    name: str = MISSING  # the choice of data=
    path: str = MISSING  # the sources' paths are below it
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # by names of your own
    lanes: int = MISSING  # fixed for the run; every data-parallel size that divides it gives the same batches
    stages: list[StageConfig] = field(default_factory=list)
    document_mask: bool = False  # a token sees only its own document; positions restart with each document
    fim_rate: float = 0.0  # share of documents' pieces that teach to fill in the middle; fixed for the run
    on_bad_shard: OnBadShard = OnBadShard.stop  # a shard that is lost for good
    allow_pipe: bool = False  # run the commands of pipe: sources; frozen files do not grant it
    cache: CacheConfig = field(default_factory=CacheConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise UserError(f"data.lanes={self.lanes}: give at least 1")
        check_fim_rate("data.fim_rate", self.fim_rate)
        if not self.sources:
            raise UserError("data.sources is empty: give data.sources.NAME.path=FOLDER")
        bad = [name for name in self.sources if not name.replace("_", "").replace("-", "").isalnum()]
        if bad:
            raise UserError(f"data.sources: {bad[0]!r} is no name of a source: give letters, digits, - and _")
        steps = [stage.step for stage in self.stages]
        if steps != sorted(set(steps)) or (steps and steps[0] < 0):
            raise UserError(f"data.stages start at steps {steps}: give 0 or more, each later than the one before")
        for stage in self.stages:
            unknown = [name for name in stage.weights or () if name not in self.sources]
            if unknown:
                raise UserError(
                    f"data.stages: step {stage.step} weighs {unknown[0]}, which is none of data.sources "
                    f"({', '.join(self.sources)}): give its path with data.sources.{unknown[0]}.path"
                )

    @property
    def pipes(self) -> list[str]:
        """The sources whose bytes a command gives."""
        return [name for name in self.sources if self.location(name, "train").startswith("pipe:")]

    def location(self, name: str, split: str) -> str:
        """The folder, URL or pipe of one split of a source."""
        return below(below(self.path, self.sources[name].path), split)


def check_fim_rate(knob: str, rate: float) -> None:
    """Raises UserError unless `rate` is a share."""
    if not 0 <= rate <= 1:
        raise UserError(f"{knob}={rate}: give a share from 0, which rearranges nothing, to 1")


def below(root: str, path: str) -> str:
    """`path` below `root`, unless it is absolute, a URL or a pipe; in a pipe's command it goes before {}."""
    if path.startswith(("/", "pipe:")) or "://" in path:
        return path
    if path == ".":
        return root
    if root.startswith("pipe:"):
        return root.replace("{}", f"{path}/{{}}")
    folder, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return f"{folder.rstrip('/')}/{path}{mark}{query}"


@dataclass
class OrderConfig:
    """`python -m data_pipeline.order`: the windows and documents of the steps of a run."""

    data: DataConfig = MISSING
    steps: str | None = None  # FIRST:END, or one step; null = step 0, and with find all that the run has made
    dp: int = 1  # data-parallel ranks
    rank: int | None = None  # data-parallel rank; null = all, one after the other
    find: str | None = None  # a document's id: only the windows that hold it
    checkpoint: str | None = None  # a run's folder or a checkpoint, instead of data, n_ctx, tokens_per_step and seed
    n_ctx: int = 1024  # tokens of a window
    tokens_per_step: int = 524288  # of all ranks together
    batch_ramp: RampConfig = field(default_factory=RampConfig)
    seed: int = 1337  # of the order
    json: bool = False  # print JSON instead of a table

    def __post_init__(self) -> None:
        if self.dp < 1 or (self.rank is not None and not 0 <= self.rank < self.dp):
            raise UserError(f"dp={self.dp} and rank={self.rank}: give at least 1 rank, and rank from 0 to dp - 1")
        if self.n_ctx < 1:
            raise UserError(f"n_ctx={self.n_ctx}: give the tokens of a window, at least 1")
        if self.step_range is not None and not self.step_range:
            raise UserError(f"steps={self.steps}: give FIRST:END with FIRST below END, such as 1000:1002, or one step")
        if self.find is not None and self.steps is None and self.checkpoint is None:
            raise UserError(
                f"find={self.find}: say in which steps, as in steps=0:5000, or of which run, checkpoint=DIR"
            )

    @property
    def step_range(self) -> range | None:
        """The steps to show; None if not given, empty if `steps` is not a range."""
        if self.steps is None:
            return None
        first, mark, end = self.steps.partition(":")
        if not all(part.isascii() and part.isdecimal() and len(part) <= 12 for part in (first, end if mark else first)):
            return range(0)
        return range(int(first), int(end) if mark else int(first) + 1)
