"""What `make` says on a machine that lacks something, and that it installs once. No package is downloaded here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project with our Makefile and nothing to install but itself."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def python(folder: Path, before: str) -> Path:
    """An interpreter that runs `before` first: this one, with something missing."""
    script = folder / "python-stub"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} "$@"\nexec {sys.executable} -c "{before}\n$2"\n'
    )
    script.chmod(0o755)
    return script


def make(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """`make` as from a fresh shell: this may itself run under make."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k != "PYTHON"}
    return subprocess.run(["make", *map(str, args)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("import sys; sys.version_info = (3, 10, 4)", "too old; Gradus needs 3.11 or newer"),
        ("import sys; sys.modules['ensurepip'] = None", "has no venv module"),
    ],
)
def test_an_unfit_python_is_named(checkout: Path, before: str, message: str) -> None:
    result = make(checkout, "check", f"PYTHON={python(checkout, before)}")
    assert result.returncode != 0 and message in result.stderr


def test_a_missing_python_is_named(checkout: Path) -> None:
    result = make(checkout, "check", "PYTHON=no-such-python")
    assert result.returncode != 0 and "no no-such-python here" in result.stderr


def test_a_full_disk_is_named_before_the_installation(checkout: Path) -> None:
    result = make(checkout, "check", f"PYTHON={sys.executable}", "DISK_GB=999999")
    assert result.returncode != 0 and "GB free in" in result.stderr and not (checkout / ".venv").exists()


def venv(checkout: Path, made_in: Path, interpreter: str = sys.executable) -> Path:
    """An installed .venv, as far as the Makefile looks at one; returns its stamp."""
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(interpreter)
    (checkout / ".venv/bin/pip").write_text(f"#!{made_in.resolve()}/.venv/bin/python\n")
    stamp = checkout / ".venv/.installed"
    stamp.touch()
    return stamp


def plan(checkout: Path) -> str:
    """What `make check` would do."""
    return make(checkout, "-n", "check", f"PYTHON={sys.executable}").stdout


def test_a_second_run_installs_nothing(checkout: Path) -> None:
    venv(checkout, made_in=checkout)
    assert "pip install" not in plan(checkout) and "ruff" in plan(checkout)


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(checkout: Path, change: str) -> None:
    stamp = venv(checkout, made_in=checkout)
    os.utime(checkout / change, (stamp.stat().st_mtime + 5,) * 2)
    assert "pip install" in plan(checkout)


def test_a_venv_without_its_interpreter_is_made_anew(checkout: Path) -> None:
    venv(checkout, made_in=checkout, interpreter="/nowhere/python3")
    assert "pip install" in plan(checkout)


def test_a_venv_of_another_python_is_made_anew_if_one_is_named(checkout: Path) -> None:
    other = python(checkout, "import sys; sys.version_info = (3, 99)")
    venv(checkout, made_in=checkout)
    named = make(checkout, "-n", "check", f"PYTHON={other}").stdout
    assert "pip install" in named and "of another Python" in named
    (checkout / ".venv/.installed").touch()
    assert "pip install" not in make(checkout, "-n", "check").stdout


def test_a_failed_installation_ends_in_one_plain_line(checkout: Path) -> None:
    venv(checkout, made_in=checkout).unlink()
    stub = checkout / "no-index"
    stub.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 7\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".venv/bin/python").symlink_to(stub)
    result = make(checkout, "check", f"PYTHON={sys.executable}")
    assert result.returncode != 0 and "error: the installation failed" in result.stderr
    assert not (checkout / ".venv/.installed").exists()


@pytest.mark.parametrize("name", ["a b", "it's", "c++ [x]"])
def test_any_name_of_a_folder_will_do(checkout: Path, name: str) -> None:
    (checkout / name).mkdir()
    for path in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(checkout / path, checkout / name)
    venv(checkout / name, made_in=checkout / name)
    assert "pip install" not in plan(checkout / name)


def test_a_venv_of_another_folder_is_made_anew(checkout: Path) -> None:
    venv(checkout, made_in=checkout / "before_the_move")
    assert "pip install" in plan(checkout)
