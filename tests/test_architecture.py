"""The rules of docs/imports.toml: layers, heavy libraries, sizes; and the form of docstrings.

`offences(root)` reads the source with ast, so that an import inside a function counts too. Each offence is one line:
file:line: the offence, and the rule that it breaks.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RULES: dict[str, Any] = tomllib.loads((ROOT / "docs/imports.toml").read_text(encoding="utf-8"))
OURS = ("conf", "data_pipeline", "trainer", "launch")
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ROOT_CONFIGS = ("PretrainConfig", "TrainConfig")
NO_BEGINNING = re.compile(r"(What|Whether|Who|How|Where)\b")


def sources(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of each file of ours by its path under `root`."""
    paths = [path for package in OURS for path in sorted((root / package).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def offences(root: Path) -> list[str]:
    """All that breaks a rule under `root`, sorted."""
    trees = sources(root)
    modules = {module_of(name) for name in trees}
    lines = [
        f"{name}:{line}: {text}"
        for name, tree in trees.items()
        for check in (imports_amiss, code_amiss, form_amiss)
        for line, text in check(name, tree, modules)
    ]
    return sorted({*lines, *circles(trees, modules), *sizes_amiss(trees), *too_long(root), *long_test_names(root)})


def module_of(name: str) -> str:
    """The dotted name of a file."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def begins(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def layer(module: str) -> int:
    """The index of the layer of a module of ours, from the bottom."""
    found = [name for name in RULES["layers"] if begins(module, name)]
    assert found, f"{module} is in no layer of docs/imports.toml"
    return int(RULES["layers"].index(max(found, key=len)))


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a.b import c` is a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split("/")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports_amiss(name: str, tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    module = module_of(name)
    plain = any(begins(module, prefix) for rule in RULES["plain"] for prefix in rule["modules"])
    for line, target in imports(name, tree):
        package = target.split(".")[0]
        if package in OURS:
            yield from ((line, text) for text in ours_amiss(module, target, is_entry(tree)))
        elif package in RULES["libraries"] and not any(fnmatch(name, glob) for glob in RULES["libraries"][package]):
            files = ", ".join(RULES["libraries"][package]) or "nobody"
            yield line, f"imports {package}, which only {files} may"
        elif plain and package not in sys.stdlib_module_names:
            yield line, f"imports {package}, may import only the standard library and what is plain itself"


def ours_amiss(module: str, target: str, entry: bool) -> Iterator[str]:
    if layer(target) > layer(module):
        yield f"imports {target} of {RULES['layers'][layer(target)]}, a layer above {RULES['layers'][layer(module)]}"
    for rule in RULES["never"]:
        concerned = any(begins(module, m) for m in rule["modules"]) and any(begins(target, t) for t in rule["imports"])
        allowed = entry and rule.get("entries_may", False)
        if concerned and not allowed and not any(begins(module, m) for m in rule.get("except", ())):
            yield f"imports {target}: {rule['reason']}"


def circles(trees: Mapping[str, ast.Module], modules: set[str]) -> Iterator[str]:
    """One line for each module that can be reached from itself."""
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        targets = {t if t in modules else t.rpartition(".")[0] for _, t in imports(name, tree)}
        graph[module_of(name)] = targets & modules - {module_of(name)}
    reached = {start: reach(start, graph) for start in graph}
    for start in graph:
        if start in reached[start]:
            members = sorted(module for module in reached[start] if start in reached[module])
            yield f"{start} imports itself through others: {', '.join(members)}"


def reach(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    """All modules that `start` imports, directly or through others."""
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        if (module := stack.pop()) not in seen:
            seen.add(module)
            stack += graph[module]
    return seen


def code_amiss(name: str, tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in WORLD and name != "trainer/distributed/world.py":
            yield node.lineno, f"speaks of {node.value}, which only trainer/distributed/world.py reads"
        if isinstance(node, ast.Call):
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if given.get("shell"):
                yield node.lineno, "shell=True: a file name could run a command"
            if given.get("allow_pickle"):
                yield node.lineno, "allow_pickle=True: a file that is read must not run anything"
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                yield node.lineno, "torch.load without weights_only=True: a file that is read must not run anything"


def form_amiss(name: str, tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    limit = RULES["sizes"]["lines_of_a_function"]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > limit:
                yield node.lineno, f"{length} lines in {node.name}(), at most {limit}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if NO_BEGINNING.match(text):
                line = getattr(node, "lineno", 1)
                yield line, f"the docstring begins with {text.split()[0]}: begin with what is returned or done"


def sizes_amiss(trees: Mapping[str, ast.Module]) -> Iterator[str]:
    sizes = RULES["sizes"]
    count = Counter(name.rpartition("/")[0] for name in trees if not name.endswith("/__init__.py"))
    for folder, files in sorted(count.items()):
        limit = sizes.get(f"files_of_{folder}", sizes["files_of_a_package"])
        if files > limit:
            yield f"{folder}: {files} files, at most {limit}"
    takers = [
        f"{name}:{node.lineno} {node.name}" for name, tree in trees.items() for node in root_config_functions(tree)
    ]
    if len(takers) > sizes["root_config_functions"]:
        limit = sizes["root_config_functions"]
        yield f"{len(takers)} functions take a root config, at most {limit}: {', '.join(takers)}"


def root_config_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions that take a whole root config instead of the sections that they read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hints = [
                a.annotation for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.annotation
            ]
            if any(re.search(rf"\b{root}\b", ast.unparse(hint)) for hint in hints for root in ROOT_CONFIGS):
                yield node


def is_entry(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def too_long(root: Path) -> list[str]:
    """One line for each file of ours that is longer than a reader takes for one idea."""
    limit = RULES["sizes"]["lines_of_a_file"]
    paths = [path for package in OURS for path in sorted((root / package).rglob("*.py"))]
    counts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in paths}
    return [f"{name}:{n}: {n} lines in a file, at most {limit}" for name, n in counts.items() if n > limit]


def long_test_names(root: Path) -> Iterator[str]:
    """One line for each test whose name is longer than a line of a report has room for."""
    limit = RULES["sizes"]["letters_of_a_test_name"]
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > limit:
                name = path.relative_to(root).as_posix()
                yield f"{name}:{node.lineno}: {len(node.name)} letters in {node.name}(), at most {limit}"


def test_every_file_keeps_the_rules() -> None:
    assert offences(ROOT) == []


PLANTED = {
    "a library elsewhere": (
        "trainer/loop.py",
        "import mlflow",
        "imports mlflow, which only trainer/tracking/mlflow_sender",
    ),
    "inside a function": (
        "trainer/engine/schedule.py",
        "def f():\n    import torch",
        "imports torch, may import only the standard",
    ),
    "under another name": (
        "trainer/loop.py",
        "from megatron.core import parallel_state as p",
        "imports megatron, which only",
    ),
    "by a string": ("launch/plan.py", "importlib.import_module('deepspeed.comm')", "imports deepspeed, which only"),
    "data knows no trainer": (
        "data_pipeline/order/plan.py",
        "from trainer.config import Unit",
        "imports trainer.config.Unit of trainer.config, a layer above data_pipeline.order",
    ),
    "an arrow upwards in a package": (
        "trainer/engine/engine.py",
        "from trainer.loop import Trainer",
        "imports trainer.loop.Trainer of trainer, a layer above trainer.engine",
    ),
    "relative": ("trainer/model/gpt.py", "from ...launch import plan", "imports launch.plan of launch, a layer above"),
    "the preparing half": (
        "trainer/loop.py",
        "from data_pipeline.prepare import run",
        "imports data_pipeline.prepare.run: training needs the streaming half",
    ),
    "torch beside the loader": (
        "data_pipeline/stream/windows.py",
        "from torch import Tensor",
        "imports torch, which only data_pipeline/stream/loader.py",
    ),
    "torch on a login node": (
        "launch/doctor.py",
        "import torch.cuda",
        "imports torch, which only data_pipeline/stream",
    ),
    "a heavy config": (
        "trainer/config/pretrain.py",
        "import numpy as np",
        "imports numpy, may import only the standard library",
    ),
    "conf without an entry": (
        "trainer/loop.py",
        "from conf.schema import load",
        "imports conf.schema.load: only entries compose",
    ),
    "pickle": ("trainer/checkpoint/load.py", "import pickle", "imports pickle, which only nobody may"),
    "an unsafe load": ("trainer/checkpoint/load.py", "torch.load(path)", "torch.load without weights_only=True"),
    "an unsafe array": (
        "data_pipeline/stream/windows.py",
        "np.load(f, allow_pickle=True)",
        "allow_pickle=True: a file",
    ),
    "a shell": (
        "launch/slurm/launcher.py",
        "subprocess.run(line, shell=True)",
        "shell=True: a file name could run a command",
    ),
    "the rank": (
        "trainer/loop.py",
        "rank = os.environ['RANK']",
        "speaks of RANK, which only trainer/distributed/world.py reads",
    ),
    "a long function": ("trainer/loop.py", "def f():\n" + "    x = 1\n" * 60, "61 lines in f(), at most 60"),
    "a long file": ("trainer/loop.py", "x = 1\n" * 301, "301 lines in a file, at most 300"),
    "a long test name": ("tests/test_x.py", f"def test_{56 * 'x'}(): ...", "61 letters in test_x"),
    "a docstring that tells no thing": (
        "trainer/loop.py",
        'def f():\n    """What a step has done."""',
        "the docstring begins with What: begin with what is returned or done",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_offender_is_named(planted: str, tmp_path: Path) -> None:
    """Each is named with its file, its line and the rule."""
    name, code, rule = PLANTED[planted]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(code + "\n" if not code.endswith("\n") else code)
    (found,) = offences(tmp_path)
    line = next((i for i, text in enumerate(code.splitlines(), 1) if "import" in text), 301 if "301" in rule else 1)
    assert found.startswith(f"{name}:{line}: {rule}")


def test_a_planted_circle_is_named(tmp_path: Path) -> None:
    """Modules of one layer that import one another, also where one does so inside a function."""
    (tmp_path / "trainer/model").mkdir(parents=True)
    (tmp_path / "trainer/model/a.py").write_text("from trainer.model.b import x\n")
    (tmp_path / "trainer/model/b.py").write_text("def f():\n    from trainer.model import c\n")
    (tmp_path / "trainer/model/c.py").write_text("import trainer.model.a\n")
    found = offences(tmp_path)
    assert len(found) == 3 and all("imports itself through others" in line for line in found)
    assert "trainer.model.a, trainer.model.b, trainer.model.c" in found[0]


def test_planted_crowds_are_counted(tmp_path: Path) -> None:
    """A package of 13 files, and 16 functions that take a root config."""
    (tmp_path / "trainer/model").mkdir(parents=True)
    for i in range(13):
        (tmp_path / f"trainer/model/m{i}.py").write_text(f"def f{i}(cfg: PretrainConfig | None): ...\n")
    (tmp_path / "trainer/loop.py").write_text("def f(*, cfg: 'TrainConfig'): ...\n" * 3)
    crowd, takers = sorted(offences(tmp_path), key=lambda line: "root config" in line)
    assert crowd == "trainer/model: 13 files, at most 12"
    assert takers.startswith("16 functions take a root config, at most 15: ")


def test_an_entry_may_read_its_config(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    entry = "from conf.schema import run\n\nif __name__ == '__main__':\n    run(PretrainConfig, print)\n"
    (tmp_path / "trainer/pretrain.py").write_text(entry)
    assert offences(tmp_path) == []


def modules(*globs: str) -> list[str]:
    paths = sorted({path for glob in globs for path in ROOT.glob(glob) if "__main__" not in path.name})
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]


def import_without(blocked: tuple[str, ...], names: list[str]) -> None:
    """Import `names` in a fresh Python where the packages `blocked` are not installed."""
    code = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {names!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_configs_and_launch_import_without_torch() -> None:
    names = modules("conf/*.py", "launch/**/*.py", "trainer/config/*.py", "trainer/run/*.py", "trainer/plan/*.py")
    names += [module for rule in RULES["plain"] for module in rule["modules"]]
    names += ["trainer.pretrain", "trainer.generate", "data_pipeline.manifest", "data_pipeline.order.plan"]
    import_without(("torch", "deepspeed", "megatron", "webdataset", "mlflow", "transformers", "tokenizers"), names)


def test_all_imports_without_optional_packages() -> None:
    """A run that does not use MLflow, plots, transformers, tokenizers or recipes needs none of them."""
    names = modules("trainer/**/*.py", "data_pipeline/*.py")
    assert "trainer.loop" in names
    import_without(("mlflow", "matplotlib", "transformers", "tokenizers", "datatrove"), names)
