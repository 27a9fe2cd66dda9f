"""What the documents claim and a test can check: commands, files, numbers, the generated page, the pinned versions."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conf.frozen import freeze, thaw
from conf.schema import load, options
from data_pipeline.order.stages import plan_ledger
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.recipe_config import MinHashConfig, QualityConfig
from docs import generate_architecture, generate_config, generate_evaluation, generate_runbook
from docs.generate_config import ROOTS
from launch.compare.compare import split
from launch.config import PlanConfig, SubmitConfig
from launch.plan import cluster_of
from tests.benchmarks import attention, checkpoint, corpus, extraction, loader, sampling, scale, train_speed
from tests.helpers.fixtures import make_source
from trainer.config.attention import Pattern
from trainer.config.model import ModelConfig
from trainer.config.pretrain import PretrainConfig
from trainer.config.tuning.common import TuneConfig
from trainer.config.tuning.reward import RewardConfig
from trainer.config.tuning.sft import SftConfig
from trainer.distributed.world import World
from trainer.engine.schedule import lr_at
from trainer.model.arithmetic import param_count
from trainer.plan.choose import rows, settle
from trainer.plan.layout_rules import check_layout
from trainer.tuning.check import check_tuned_layout

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = (checkpoint, corpus, extraction, loader, scale)
MADE = (generate_config, generate_architecture, generate_evaluation, generate_runbook)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("made", MADE, ids=lambda m: m.TARGET.stem)
def test_the_made_pages_are_fresh(made: Any) -> None:
    assert made.TARGET.read_text(encoding="utf-8") == made.page(), f"{made.TARGET.name} is stale: make docs"


def commands(text: str) -> list[list[str]]:
    """The lines of the bash blocks, as words; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class Line(NamedTuple):
    """What a documented line runs of ours, behind python, torchrun or deepspeed."""

    page: str
    module: str
    arguments: list[str]
    ranks: int


def lines(page: str, words: list[str]) -> Iterator[Line]:
    if "--" in words:  # launch.supervise ... -- COMMAND, launch.submit ... -- OVERRIDES
        at = words.index("--")
        before = list(lines(page, words[:at]))
        yield from before
        submitted = [line for line in before if line.module == "launch.submit"]
        yield from map(submitted_run, submitted, [words[at + 1 :]]) if submitted else lines(page, words[at + 1 :])
        return
    at = next((i for i, word in enumerate(words) if word in ("-m", "--module")), None)
    if at is not None and words[at + 1].split(".")[0] in ("data_pipeline", "trainer", "launch"):
        yield Line(page, words[at + 1], words[at + 2 :], ranks(words[:at]))


def submitted_run(line: Line, overrides: list[str]) -> Line:
    """What launch.submit starts: trainer.pretrain with the run's name and the cluster's GPUs."""
    cfg = load(SubmitConfig, line.arguments)
    own = [f"run.name={cfg.run.name}", f"run.dir={cfg.run.dir}", f"gpu={cfg.cluster.gpu}"]
    count = cfg.cluster.nodes * cfg.cluster.gpus_per_node
    return Line(line.page, "trainer.pretrain", [*overrides, *own], count)


def ranks(launcher: list[str]) -> int:
    """How many it starts. deepspeed takes all GPUs: eight on the machine that the README speaks of."""
    given = dict(pairwise(launcher))
    return int(given.get("--nnodes", 1)) * int(given.get("--nproc-per-node", 8 if "deepspeed" in launcher else 1))


def schema_of(module: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the dataclass that a module's command gets for these arguments, read from its source."""
    path = ROOT / module.replace(".", "/")
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    calls = [
        node
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("run", "run_one_of")
    ]
    [first] = [call.args[0] for call in calls]
    if module == "launch.compare":  # the folders of the runs come before its values
        _, arguments = split(arguments)
    if isinstance(first, ast.Dict):
        commands = {ast.literal_eval(key): value for key, value in zip(first.keys, first.values, strict=True) if key}
        pair = commands[arguments[0]]
        assert isinstance(pair, ast.Tuple)
        first, arguments = pair.elts[0], arguments[1:]
    assert isinstance(first, ast.Name)
    return first.id, arguments


SCHEMAS = {schema.__name__: schema for schema in ROOTS.values()}
DOCUMENTED = [
    line
    for path in PAGES
    for words in commands(path.read_text(encoding="utf-8"))
    for line in lines(path.relative_to(ROOT).as_posix(), words)
]


@pytest.mark.parametrize("line", DOCUMENTED, ids=lambda line: " ".join([line.module, *line.arguments]))
def test_every_documented_command_can_train_on_its_ranks(line: Line) -> None:
    """Its config composes, and fits the ranks that it starts."""
    name, overrides = schema_of(line.module, line.arguments)
    cfg: Any = load(SCHEMAS[name], overrides)
    if isinstance(cfg, PlanConfig):
        assert rows(cfg, cluster_of(cfg.cluster)[0])[0].fits
    if isinstance(cfg, TuneConfig):
        check_tuned_layout(cfg, line.ranks)
    if type(cfg) is PretrainConfig:  # a plan is for other ranks than those that make it
        cfg, _ = settle(cfg, World(0, line.ranks, 0, line.ranks))
        check_layout(cfg, line.ranks)
        steps, each = cfg.max_steps, cfg.tokens_per_step
        run = {"max_steps": steps, "step_tokens": each, "end_tokens": steps * each}
        looked = [*range(0, steps, 1 + steps // 20000), steps - 1]
        rates = [lr_at(cfg.optim.schedule, 1.0, step=s, tokens=s * each, **run) for s in looked]
        assert max(rates) > 0.99 and rates[-1] < 0.2  # warm-up and decay both fit into the run


def test_the_page_on_tuning_says_the_settings_that_are_there() -> None:
    given = ["init_from=a", "examples.path=a.jsonl"]
    cfg = load(SftConfig, given)
    schedule = cfg.optim.schedule
    page = " ".join((ROOT / "docs/tuning.md").read_text(encoding="utf-8").split())
    kind = f"{schedule.kind.value} to {schedule.floor:.0%}"
    assert schedule.warmup == 0 and f"{cfg.epochs} epochs of batches of {cfg.batch_size}, {kind}, no warm-up" in page
    assert f"dropout {cfg.model.dropout} (theirs" in page
    assert not load(RewardConfig, given).checkpoint.keep_best and "`keep_best` is off" in page


def test_runs_of_the_readme_do_not_resume_one_another() -> None:
    """Another number of ranks would go on with the other's checkpoint instead of starting."""
    starts = {}
    for line in DOCUMENTED:
        if line.module == "trainer.pretrain":
            cfg = load(PretrainConfig, line.arguments)
            if cfg.resume_step is not None:  # it is to go on with the other's checkpoint
                continue
            assert starts.setdefault(cfg.run.dir, (line.ranks, freeze(cfg))) == (line.ranks, freeze(cfg)), cfg.run.dir
    assert len(starts) > 3


def test_the_readme_shows_the_whole_way() -> None:
    assert {line.module for line in DOCUMENTED if line.page == "README.md"} >= {
        "data_pipeline.prepare.run",
        "data_pipeline.shards",
        "trainer.pretrain",
        "trainer.generate",
        "launch.supervise",
    }


def test_the_shown_way_into_shards_without_us_finds_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/data.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert "data_pipeline" not in code
    rng = np.random.default_rng(0)
    shards = [[rng.integers(0, 50257, n) for n in rng.integers(1, 90, 30)] for _ in range(3)]
    make_source(tmp_path / "data/mine/train", shards)
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    exec(code, seen)
    expected = {f"{s}-{i}": ids.tolist() for s, documents in enumerate(shards) for i, ids in enumerate(documents)}
    assert {name: ids.tolist() for name, ids in seen["documents"].items()} == expected


def test_documented_parameter_counts_are_the_models() -> None:
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    stated = {
        name: int(count.replace(",", ""))
        for name, count in re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", text, re.MULTILINE)
    }
    assert stated == {
        name: param_count(thaw(ROOT / f"conf/model/{name}.yaml", ModelConfig)) for name in options("model")
    }


def test_shapes_of_the_models_page_are_those_of_conf() -> None:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) of (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert {name for name, *_ in stated} == options("model").keys() - {"test", "demo"}
    for name, *numbers in stated:
        m = thaw(ROOT / f"conf/model/{name}.yaml", ModelConfig)
        assert [int(n) for n in numbers] == [m.n_layer, m.n_embd, m.n_head, m.n_embd // m.n_head, m.n_ctx], name


def test_blocks_of_the_models_page_are_those_of_its_patterns() -> None:
    """The blocks of 128 x 128 that FlexAttention computes at 2,048 tokens."""
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([DBSF])` \| `?([a-z=\d ]*?)`? ?\| (\d+)", text, re.MULTILINE)
    assert len(rows) == 8
    for letter, given, blocks in rows:
        numbers = {key: int(value) for key, _, value in (word.partition("=") for word in given.split())}
        pattern = Pattern(letter, **{"band": 0, "stride": 0, "summary": 0, **numbers})
        assert int(blocks) == sum(pattern.sees_block(q, k, 128) for q in range(16) for k in range(q + 1)), (
            letter,
            given,
        )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_between_documents_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in link or (path.parent / link).exists(), link


def test_no_page_holds_both_sides_of_a_merge() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert len(PAGES) > 30 and not re.findall(r"^[<>]{7} .*", text, re.MULTILINE)


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8"))) <= targets


@pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(),
    reason="constraints.txt is what `make` installs into .venv; this Python is another",
)
def test_constraints_pin_what_the_project_asks_for() -> None:
    """A version for each package that pyproject.toml asks for, directly or not: the one that is installed."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for name, version in closure([Requirement(r) for r in asked]).items():
        if not name.startswith(("nvidia-", "cuda-", "triton")):  # torch pins these itself, for the GPU build
            assert pinned.get(name) == version, (
                f"{name} {version} is installed, constraints.txt says {pinned.get(name)}"
            )


def closure(todo: list[Requirement]) -> dict[str, str]:
    """{name: version} of what these need on this machine, without a local version mark such as +cpu."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            found[name] = distribution(name).version.split("+")[0]
            needs = [Requirement(r) for r in distribution(name).requires or []]
            todo += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name: version for name, version in found.items() if name not in ("setuptools", "pip", "wheel")}


def several_sources() -> str:
    return (ROOT / "docs/data.md").read_text(encoding="utf-8").split("## Several sources")[1].split("\n## ")[0]


SOURCES = ("data=mix", "data.sources.web.path=web", "data.sources.books.path=books", "max_steps=5000")


@pytest.mark.parametrize(
    "overrides",
    [
        tuple(shlex.split(given))
        for row in re.findall(r"^\| [^|]* \| (.*) \|$", several_sources(), re.MULTILINE)
        for given in re.findall(r"`([^`]*=[^`]*)`", row)
    ],
    ids=" ".join,
)
def test_every_way_to_change_a_mixture_can_be_planned(overrides: tuple[str, ...]) -> None:
    given = [o.replace("NAME", "web") for o in overrides]
    data = SOURCES[-1:] if "data=gpt3_mix" in given else SOURCES
    path = ["data.path=data"] if "data=gpt3_mix" in given else []
    cfg = load(PretrainConfig, [*data, *path, "data.lanes=16", *given])
    assert isinstance(cfg, PretrainConfig)
    check_layout(cfg, 8)
    plan_ledger(cfg.data, n_ctx=cfg.model.n_ctx, tokens_per_step=cfg.tokens_per_step, ramp=cfg.batch_ramp)


CORPUS = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
IN_TEXT = re.sub(r"^```.*?^```", "", CORPUS, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "override", sorted(set(re.findall(r"`(corpus\.recipe\.[^`]*=[^`]*)`", IN_TEXT))), ids=lambda text: text
)
def test_every_way_to_change_a_recipe_changes_it(override: str) -> None:
    given = ["corpus=common_crawl", "corpus.recipe.dedup=null", "input=archives", "output=crawl"]
    assert (
        load(PrepareConfig, [*given, *shlex.split(override)]).corpus.recipe != load(PrepareConfig, given).corpus.recipe
    )


RECIPES = ("common_crawl", "webtext", "books", "common_crawl corpus.recipe.decontaminate.sets=[a]")


def test_the_values_that_the_corpus_page_states_are_the_recipes() -> None:
    known: dict[str, set[str]] = {}
    for words in RECIPES:
        recipe = load(PrepareConfig, [*f"corpus={words}".split(), "input=in", "output=out"]).corpus.recipe
        for section, values in vars(recipe).items():
            for key, value in vars(values).items() if is_dataclass(values) else ():
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                known.setdefault(f"{section}.{key}", set()).add(shown)
    stated = re.findall(r"`([a-z]\w+\.\w+)=([\w.-]+)`", IN_TEXT)
    assert len(stated) > 15
    for key, value in stated:
        if not key.startswith(("corpus.", "executor.", "shards.")):
            assert value in known[key], f"{key}={value}, the recipes have {known[key]}"


def test_numbers_of_the_corpus_page_are_right() -> None:
    """They are those of its formulas, presets and benchmark."""
    kept = re.findall(r"(\d+\.?\d*)% at ([\d.]+)", CORPUS)
    assert len(kept) == 2
    for percent, score in kept:
        assert f"{100 * (2 - float(score)) ** -QualityConfig.alpha:.2g}" == percent
    ((cases, similarity),) = re.findall(r"(\d+) of 100 pairs of Jaccard similarity\s+([\d.]+\d)", CORPUS)
    fineweb = thaw(ROOT / "conf/minhash/fineweb.yaml", MinHashConfig)
    found = 1 - (1 - float(similarity) ** fineweb.rows) ** fineweb.bands
    assert round(100 * found) == int(cases)
    (preset,) = re.findall(r"(corpus\.recipe\.dedup\.minhash='\{.*?\}')", CORPUS)
    given = ["corpus=books", "input=in", "output=out", *shlex.split(preset)]
    assert load(PrepareConfig, given).corpus.recipe.dedup.minhash == thaw(
        ROOT / "conf/minhash/gpt3.yaml", MinHashConfig
    )
    ((best, fast),) = re.findall(r"F1 is ([\d.]+) and ([\d.]+)", CORPUS)
    measured = json.loads((ROOT / "docs/benchmarks/extraction.json").read_text())["engines"]
    assert [f"{measured[name]['f1']:.2f}" for name in ("best", "fast")] == [best, fast]


@pytest.mark.parametrize(
    "markdown",
    [bench.markdown for bench in (attention, checkpoint, corpus, extraction, loader, sampling, scale, train_speed)],
    ids=lambda f: f.__module__,
)
def test_the_numbers_of_a_benchmark_are_those_of_its_result(markdown: Callable[[dict[str, Any]], str]) -> None:
    page = ROOT / "docs" / "benchmarks" / f"{markdown.__module__.rpartition('.')[2]}.md"
    result = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert markdown(result) in page.read_text(encoding="utf-8"), "print it again with --markdown"
