"""What the documents claim and a test can check: commands, files, numbers, the generated page, the pinned versions."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conf.schema import ROOTS, freeze, load, options, thaw
from docs.generate_config import TARGET, page
from trainer.arithmetic import param_count
from trainer.config import ModelConfig, PretrainConfig, check_layout
from trainer.schedule import lr_at

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_config_page_is_what_the_configs_say_now() -> None:
    assert TARGET.read_text(encoding="utf-8") == page(), "docs/config.md is stale: make docs"


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
    if "--" in words:  # launch.supervise ... -- COMMAND
        at = words.index("--")
        yield from [*lines(page, words[:at]), *lines(page, words[at + 1 :])]
        return
    at = next((i for i, word in enumerate(words) if word in ("-m", "--module")), None)
    if at is not None and words[at + 1].split(".")[0] in ("data_pipeline", "trainer", "launch"):
        yield Line(page, words[at + 1], words[at + 2 :], ranks(words[:at]))


def ranks(launcher: list[str]) -> int:
    """How many it starts. deepspeed takes all GPUs: eight on the machine that the README speaks of."""
    given = dict(pairwise(launcher))
    return int(given.get("--nnodes", 1)) * int(given.get("--nproc-per-node", 8 if "deepspeed" in launcher else 1))


def root_of(module: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The config that `run` in a module composes for these arguments, read from its source."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    (entries,) = [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run"
    ]
    if isinstance(entries, ast.Dict):
        pair = {ast.literal_eval(key): value for key, value in zip(entries.keys, entries.values, strict=True) if key}[
            arguments[0]
        ]
        arguments = arguments[1:]
    else:
        pair = entries
    assert isinstance(pair, ast.Tuple)
    return ast.literal_eval(pair.elts[0]), arguments


DOCUMENTED = [
    line
    for path in PAGES
    for words in commands(path.read_text(encoding="utf-8"))
    for line in lines(path.relative_to(ROOT).as_posix(), words)
]


@pytest.mark.parametrize("line", DOCUMENTED, ids=lambda line: " ".join([line.module, *line.arguments]))
def test_every_documented_command_gets_a_config_that_its_ranks_can_train(line: Line) -> None:
    root, overrides = root_of(line.module, line.arguments)
    cfg = load(root, overrides)
    assert isinstance(cfg, ROOTS[root])
    if isinstance(cfg, PretrainConfig):
        check_layout(cfg, line.ranks)
        run = {"max_steps": cfg.max_steps, "tokens_per_step": cfg.tokens_per_step}
        rates = [
            lr_at(cfg.optim.schedule, 1.0, step=s, tokens=s * cfg.tokens_per_step, **run) for s in range(cfg.max_steps)
        ]
        assert max(rates) > 0.99 and rates[-1] < 0.2  # warm-up and decay both fit into the run


def test_runs_of_the_readme_do_not_resume_one_another() -> None:
    """Another number of ranks would go on with the other's checkpoint instead of starting."""
    starts = {}
    for line in DOCUMENTED:
        if line.module == "trainer.pretrain":
            cfg = load("pretrain", line.arguments)
            assert starts.setdefault(cfg.run.dir, (line.ranks, freeze(cfg))) == (line.ranks, freeze(cfg)), cfg.run.dir
    assert len(starts) > 3


def test_the_readme_shows_the_whole_way() -> None:
    assert {line.module for line in DOCUMENTED if line.page == "README.md"} >= {
        "data_pipeline.shards",
        "trainer.pretrain",
        "trainer.generate",
        "launch.supervise",
    }


def test_parameter_counts_in_the_readme_are_those_of_the_models() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = {
        name: int(count.replace(",", ""))
        for name, count in re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", text, re.MULTILINE)
    }
    assert stated == {
        name: param_count(thaw(ROOT / f"conf/model/{name}.yaml", ModelConfig)) for name in options("model")
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_between_documents_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in link or (path.parent / link).exists(), link


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
