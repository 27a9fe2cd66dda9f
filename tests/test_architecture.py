"""Who may import whom, one door for each heavy library, and how long a file may be (docs/architecture.md).

`offences(root)` reads the source with ast, so that an import inside a function counts too. Each offence is one line:
file:line: what it does, and the rule that it breaks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("conf", "data_pipeline", "launch", "trainer")
CONFIGS = (
    "data_pipeline.config",
    "data_pipeline.prepare.config",
    "data_pipeline.prepare.quality.config",
    "data_pipeline.prepare.recipe_config",
    "data_pipeline.order.lookup.geometry",
    "trainer.config",
    "trainer.config.checkpoint",
    "trainer.config.node_check",
    "trainer.config.model",
    "trainer.config.optim",
    "trainer.config.health",
    "trainer.config.tracking",
)
ORDER = ("ledger", "mixture", "epochs", "plan", "stages")  # pure: the order of the data
STREAMING = tuple(f"data_pipeline.{m}" for m in ("config", "geometry", "manifest", "bpe", *ORDER, "stream", "loader"))


@dataclass(frozen=True)
class Room:
    """What the files of a place may import; the first room that matches a file counts."""

    files: tuple[str, ...]
    ours: tuple[str, ...]  # modules (or whole packages) of this project
    others: (
        tuple[str, ...] | None
    )  # packages from elsewhere, beside the standard library; None = any whose door is open


ROOMS = (
    Room(
        ("conf/*",),
        (*CONFIGS, "launch.config", "launch.cluster_config", "conf.frozen", "conf.hints"),
        ("hydra", "omegaconf", "yaml"),
    ),
    Room(("data_pipeline/config.py",), (), ()),
    Room(
        (
            "data_pipeline/order/geometry.py",
            "data_pipeline/order/ledger.py",
            "data_pipeline/prepare/config.py",
            "data_pipeline/prepare/quality/config.py",
            "data_pipeline/prepare/recipe_config.py",
        ),
        ("data_pipeline.config", "data_pipeline.prepare.quality.config", "data_pipeline.prepare.recipe_config"),
        (),
    ),
    Room(("data_pipeline/manifest.py",), ("data_pipeline.config",), ("numpy",)),
    Room(
        tuple(f"data_pipeline/{m}.py" for m in ORDER),
        ("data_pipeline.config", "data_pipeline.order.lookup.geometry", *(f"data_pipeline.{m}" for m in ORDER)),
        ("numpy",),
    ),
    Room(("data_pipeline/*",), ("data_pipeline",), None),
    Room(
        (
            "trainer/*config.py",
            "trainer/model/arithmetic.py",
            "trainer/plan/layout_rules.py",
        ),
        CONFIGS,
        (),
    ),
    Room(
        tuple(f"trainer/{m}.py" for m in ("world", "journal", "exit_codes", "code_version", "progress", "redact")),
        CONFIGS,
        (),
    ),
    Room(("trainer/engine/schedule.py",), (*CONFIGS, "data_pipeline.order.lookup.ledger"), ()),
    Room(
        ("trainer/run/signals.py", "trainer/run/heartbeat.py", "trainer/health/hang_report.py"),
        ("trainer.run.exit_codes", "trainer.run.progress"),
        (),
    ),
    Room(("trainer/diagnostics/check_result.py",), (), ()),
    Room(("trainer/diagnostics/machine.py",), ("trainer.diagnostics.check_result",), ()),
    Room(
        ("trainer/plan/*",),
        (*CONFIGS, *(f"trainer.{m}" for m in ("arithmetic", "layouts", "plan", "world"))),
        (),
    ),
    Room(("trainer/run/folder.py",), (*CONFIGS, "trainer.model.arithmetic"), ()),
    Room(("trainer/*",), ("trainer", *STREAMING), None),
    Room(("launch/*config.py",), (*CONFIGS, "launch.cluster_config", "trainer.run.redact"), ()),
    Room(
        ("launch/*",),
        (
            "launch",
            "conf.schema",
            *CONFIGS,
            "data_pipeline.order.lookup.ledger",
            "data_pipeline.manifest",
            *(
                f"trainer.{m}"
                for m in (
                    "arithmetic",
                    "check",
                    "code_version",
                    "exit_codes",
                    "heartbeat",
                    "layouts",
                    "world",
                    "run_folder",
                    "journal",
                    "plan",
                    "redact",
                    "signals",
                )
            ),
            *(f"trainer.{m}" for m in ("address", "finding", "machine", "sources")),
        ),
        None,
    ),
)

DOORS = {
    "torch": ("data_pipeline/stream/loader.py", "trainer/*"),
    "deepspeed": ("trainer/distributed/mesh.py", "trainer/engine/fragments.py", "trainer/engine/bf16_optimizer.py"),
    "megatron": ("trainer/distributed/mesh.py", "trainer/model/linear.py", "trainer/model/loss.py"),
    "mlflow": ("trainer/tracking/mlflow_sender.py",),
    "matplotlib": (
        "trainer/tracking/mixture_plot.py",
        "trainer/tracking/plots.py",
        "launch/plan_plot.py",
        "data_pipeline/prepare/*",
    ),
    "webdataset": ("data_pipeline/shards/write.py",),
    "urllib3": ("data_pipeline/remote/backends.py", "data_pipeline/prepare/web/http.py"),
    "fsspec": ("data_pipeline/remote/backends.py",),
    "ray": ("data_pipeline/prepare/executors/on_ray.py",),
    "datatrove": ("data_pipeline/prepare/*",),
    "sklearn": ("data_pipeline/prepare/quality/model.py",),
    "scipy": ("data_pipeline/prepare/dedup/groups.py", "data_pipeline/prepare/quality/model.py"),
    "resiliparse": ("data_pipeline/prepare/warc/charset.py", "data_pipeline/prepare/extract/page_text.py"),
    "trafilatura": ("data_pipeline/prepare/extract/page_text.py",),
    "ftfy": ("data_pipeline/prepare/extract/page_text.py",),
    "fastwarc": ("data_pipeline/prepare/web/page_archive.py",),
    "transformers": ("trainer/export_hf.py",),
    "jinja2": ("launch/slurm/launcher.py", "data_pipeline/prepare/funnel.py"),
    "hydra": ("conf/schema.py",),
    "omegaconf": ("conf/schema.py", "conf/frozen.py"),
    "yaml": ("conf/frozen.py",),
    **dict.fromkeys(("pickle", "dill", "cloudpickle", "shelve"), ()),  # a file that is read must not run anything
}
"""The files that may import a package; none = nobody."""

WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
FILE_LINES, FUNCTION_LINES = 300, 60


def offences(root: Path) -> list[str]:
    """All that breaks a rule under `root`, sorted."""
    found = []
    for package in OURS:
        for path in (root / package).rglob("*.py"):
            name, source = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            found += [f"{name}:{line}: {what}" for line, what in [*imports_amiss(name, tree), *code_amiss(name, tree)]]
            found += [f"{name}:{line}: {what}" for line, what in too_long(source, tree)]
    return sorted(set(found))


def imports_amiss(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    room = next(r for r in ROOMS if any(fnmatch(name, glob) for glob in r.files))
    ours = tuple(dict.fromkeys([*room.ours, *["conf.schema"] * is_entry(tree)]))
    for line, target in imports(name, tree):
        package = target.split(".")[0]
        if package in OURS:
            if not any(target == module or target.startswith(f"{module}.") for module in ours):
                yield line, f"imports {target}, may import of ours only: {', '.join(ours) or 'nothing'}"
        elif package in DOORS and not any(fnmatch(name, glob) for glob in DOORS[package]):
            yield line, f"imports {package}, whose door is {', '.join(DOORS[package]) or 'shut'}"
        elif package not in sys.stdlib_module_names and room.others is not None and package not in room.others:
            yield line, f"imports {package}, may import only {', '.join(('the standard library', *room.others))}"


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


def code_amiss(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
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


def too_long(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield lines, f"{lines} lines in a file, at most {FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"{length} lines in {node.name}(), at most {FUNCTION_LINES}"


def is_entry(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def test_every_file_keeps_the_rules() -> None:
    assert offences(ROOT) == []


PLANTED = {
    "a library past its door": (
        "trainer/loop.py",
        "import mlflow",
        "imports mlflow, whose door is trainer/tracking/mlflow_sender.py",
    ),
    "inside a function": (
        "trainer/engine/schedule.py",
        "def f():\n    import torch",
        "imports torch, may import only the standard",
    ),
    "under another name": (
        "trainer/loop.py",
        "from megatron.core import parallel_state as p",
        "imports megatron, whose",
    ),
    "by a string": ("launch/plan.py", "importlib.import_module('deepspeed.comm')", "imports deepspeed, whose door is"),
    "data knows no trainer": (
        "data_pipeline/order/plan.py",
        "from trainer.config import Unit",
        "imports trainer.config.Unit",
    ),
    "of a package": (
        "launch/submit.py",
        "from trainer import engine",
        "imports trainer.engine.engine, may import of ours only",
    ),
    "relative": ("trainer/model/gpt.py", "from ...launch import plan", "imports launch.plan, may import of ours only"),
    "the preparing half": (
        "trainer/loop.py",
        "from data_pipeline.prepare import run",
        "imports data_pipeline.prepare.run",
    ),
    "torch beside the loader": (
        "data_pipeline/stream/windows.py",
        "from torch import Tensor",
        "imports torch, whose door is",
    ),
    "torch on a login node": (
        "launch/doctor.py",
        "import torch.cuda",
        "imports torch, whose door is data_pipeline/loader",
    ),
    "a heavy config": (
        "trainer/config/pretrain.py",
        "import numpy as np",
        "imports numpy, may import only the standard library",
    ),
    "conf without an entry": (
        "trainer/loop.py",
        "from conf.schema import load",
        "imports conf.schema.load, may import",
    ),
    "pickle": ("trainer/checkpoint/load.py", "import pickle", "imports pickle, whose door is shut"),
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
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_offender_is_named_with_file_line_and_rule(planted: str, tmp_path: Path) -> None:
    name, code, rule = PLANTED[planted]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(code + "\n" if not code.endswith("\n") else code)
    (found,) = offences(tmp_path)
    line = next((i for i, text in enumerate(code.splitlines(), 1) if "import" in text), 301 if "301" in rule else 1)
    assert found.startswith(f"{name}:{line}: {rule}")


def test_an_entry_may_read_its_config(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    entry = "from conf.schema import run\n\nif __name__ == '__main__':\n    run(('pretrain', print))\n"
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
    names = modules("*/config.py", "conf/*.py", "launch/*.py")
    names += [
        f"trainer.{m}" for m in ("arithmetic", "schedule", "world", "run_folder", "journal", "pretrain", "generate")
    ]
    names += ["data_pipeline.manifest", "data_pipeline.order.lookup.plan"]
    import_without(("torch", "deepspeed", "megatron", "webdataset", "mlflow", "transformers", "tokenizers"), names)


def test_everything_imports_without_the_packages_that_a_run_may_not_use() -> None:
    names = modules("trainer/**/*.py", "data_pipeline/*.py")
    assert "trainer.loop" in names
    import_without(("mlflow", "matplotlib", "transformers", "tokenizers", "datatrove"), names)
