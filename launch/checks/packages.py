"""The Python, the packages and the checkout that a run would start with."""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from trainer.diagnostics.check_result import CheckResult, fail, ok, warn

SHOWN = ("torch", "deepspeed", "megatron-core", "webdataset", "hydra-core", "mlflow")
GIT_S = 10.0


def python_version(root: Path) -> CheckResult:
    required = _project(root).get("requires-python", ">=3.11")
    ours = f"{platform.python_version()} at {sys.executable}"
    if Version(platform.python_version()) in SpecifierSet(required):
        return ok("python", ours)
    return fail("python", f"{ours}, the project needs {required}", "make a virtual environment with such a Python")


def packages(root: Path, extras: tuple[str, ...]) -> Iterator[CheckResult]:
    """Compare the packages with pyproject.toml's requirements and with constraints.txt's tested versions."""
    installed, amiss = {}, []
    for need in _needs(root, extras):
        try:
            installed[need.name] = version(need.name)
        except PackageNotFoundError:
            amiss.append(f"{need.name} is not installed")
            continue
        if not need.specifier.contains(installed[need.name], prereleases=True):
            amiss.append(f"{need.name} is {installed[need.name]}, not {need.specifier}")
    if amiss:
        which = f"[{','.join(extras)}]" if extras else ""
        yield fail("packages", "; ".join(amiss), f"pip install -c constraints.txt -e '.{which}'")
    else:
        yield ok("packages", ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed))
    pins = _pins(root)
    others = [
        f"{name} {version_installed} (tested: {pins[name]})"
        for name, version_installed in installed.items()
        if name in pins and version_installed.partition("+")[0] != pins[name]
    ]
    if others:
        yield warn("tested versions", ", ".join(others), "pip install -c constraints.txt -e .")
    elif pins:
        yield ok("tested versions", "those of constraints.txt")


def checkout(root: Path) -> CheckResult:
    """Warns of code without a commit: a run's frozen version could not be found again."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return ok("checkout", f"gradus {gradus_version()}, no git checkout at {root}")
    changed = (_git(root, "status", "--porcelain") or "").splitlines()
    if changed:
        return warn(
            "checkout",
            f"commit {commit} and {len(changed)} changed files, {changed[0][3:]} the first",
            "git commit them, so that the run's commit names its code",
        )
    return ok("checkout", f"commit {commit}, nothing changed")


def gradus_version() -> str:
    try:
        return version("gradus")
    except PackageNotFoundError:
        return "not installed"


def _git(root: Path, *words: str) -> str | None:
    try:
        said = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.rstrip("\n") if said.returncode == 0 else None


def _project(root: Path) -> dict[str, Any]:
    path = root / "pyproject.toml"
    body = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return body.get("project", {})


def _needs(root: Path, extras: tuple[str, ...]) -> list[Requirement]:
    """The requirements of the checkout, or of the installed package without one."""
    project = _project(root)
    if project:
        optional = project.get("optional-dependencies", {})
        requirements = [Requirement(r) for r in (*project["dependencies"], *(r for e in extras for r in optional[e]))]
    else:
        requirements = [Requirement(r) for r in requires("gradus") or ()]
    return [r for r in requirements if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def _pins(root: Path) -> dict[str, str]:
    path = root / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.strip().split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
