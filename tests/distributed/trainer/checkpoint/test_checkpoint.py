"""Checkpoints: exact on the same layout, within rounding on any other, and never lost to a bad disk or a bad file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from tests.distributed import tiny_run as run
from tests.helpers.ranks import run_ranks
from trainer.run.folder import RunFolder

HERE = "tests.distributed.trainer.checkpoint.test_checkpoint"
AT = 3  # steps before the checkpoint, and after it
BANDED = {"attention": "DB", "band": 5}
SAVED: dict[str, dict[str, Any]] = {
    "fp32 zero1": {},
    "fp32 zero3": {"zero": 3},
    "bf16 zero1": {"precision": "bf16"},
    "tp2 zero1": {"tp": 2, "sequence_parallel": True},
    "banded": {"model": BANDED},
}
RESHAPED = {  # name: (saved as, loaded as)
    "tp2 zero1 -> dp2 zero3": ("tp2 zero1", {"zero": 3}),
    "dp2 zero3 -> tp2 zero1": ("fp32 zero3", {"tp": 2}),
    "dp2 zero1 -> dp2 zero2": ("fp32 zero1", {"zero": 2}),
}


def save(engine: Any, folder: Path, step: int = AT, hf: bool = False) -> str:
    """Publish in a run folder; returns the checkpoint's path."""
    saver = run.saver(engine, folder)
    saver.save(step, {"tokens": step * 128, "val_loss": 1.0}, last=hf)
    saver.wait()
    return str(saver.writer.run.checkpoint(step, 1))


def write(folder: str) -> dict[str, Any]:
    """Train, save, train on: what an uninterrupted run does after each checkpoint."""
    return {
        name: after_saving(run.config(**how), Path(folder) / name, hf=name == "tp2 zero1")
        for name, how in SAVED.items()
    }


def after_saving(cfg: Any, folder: Path, hf: bool = False) -> dict[str, Any]:
    with run.layout(tp=cfg.parallel.tp) as mesh:
        engine = run.build(cfg, mesh)
        run.curve(engine, range(AT))
        path = save(engine, folder, hf=hf)
        return {"path": path, "saved": run.digest(engine), **going_on(engine)}


def going_on(engine: Any) -> dict[str, Any]:
    return {"curve": run.curve(engine, range(AT, 2 * AT)), "then": run.digest(engine)}


def read_two_ranks(written: dict[str, Any], folder: str) -> dict[str, Any]:
    """A fresh process on the same layouts, on others, and back."""
    out: dict[str, Any] = {}
    for name, how in SAVED.items():
        with run.layout(tp=how.get("tp", 1)) as mesh:
            engine = run.build(run.config(**how), mesh, seed=1, load=Path(written[name]["path"]))
            out[name] = {"saved": run.digest(engine), **going_on(engine)}
    for name, (source, how) in RESHAPED.items():
        with run.layout(tp=how.get("tp", 1)) as mesh:
            engine = run.build(run.config(**how), mesh, seed=1, load=Path(written[source]["path"]))
            back = save(engine, Path(folder) / name)
            out[name] = {"path": back, **going_on(engine)}
    with run.layout() as mesh:
        out["one rank's disk is full"] = full_disk(run.build(run.config(), mesh), Path(folder) / "limited", only=1)
    return out


def read_one_rank(written: dict[str, Any], back: dict[str, Any], disk: str | None) -> dict[str, Any]:
    from trainer.checkpoint import load as checkpoint

    out: dict[str, Any] = {}
    with run.layout() as mesh:
        for name in ("fp32 zero1", "fp32 zero3", "tp2 zero1"):
            out[name] = going_on(run.build(run.config(), mesh, seed=1, load=Path(written[name]["path"])))
        for name in RESHAPED:
            out[f"{name} -> one rank"] = going_on(run.build(run.config(), mesh, seed=1, load=Path(back[name]["path"])))
        engine = run.build(run.config(), mesh, seed=1, load=Path(written["tp2 zero1"]["path"]))
        tokens = run.windows(0, engine.cfg.model.vocab_size).tokens[:2]
        with torch.no_grad():
            out["logits"] = engine.module.logits(tokens).tolist()
        out["other model"] = error_of(
            lambda: run.build(
                run.config(model={"n_layer": 4, "vocab_size": 300}), mesh, load=Path(written["fp32 zero1"]["path"])
            )
        )
        banded, other = Path(written["banded"]["path"]), run.config(model={**BANDED, "band": 4})
        out["other attention"] = [error_of(lambda c=c: run.build(c, mesh, load=banded)) for c in (run.config(), other)]
        out["assembled"] = {
            n: list(t.shape) for n, t in checkpoint.assemble(Path(written["tp2 zero1"]["path"])).items()
        }
        if disk:
            out["full disk"] = full_disk(engine, Path(disk) / "run")
    return out


def full_disk(engine: Any, folder: Path, only: int | None = None) -> dict[str, Any]:
    """A save that fits, one that does not. `only`: this rank alone cannot write more than 64 KiB a file."""
    first = save(engine, folder, step=1)
    if engine.mesh.world.rank == only:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
    error = error_of(lambda: [save(engine, folder, step=s) for s in range(2, 10)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    latest = RunFolder(folder).latest()
    assert latest is not None
    again = run.build(engine.cfg, engine.mesh, seed=1, load=latest)
    return {
        "error": error,
        "latest": latest.name,
        "left": sorted(p.name for p in (folder / "checkpoints").iterdir()),
        "first": Path(first).name,
        "loads": run.digest(again) == run.digest(engine),
    }


def error_of(function: Any) -> str:
    try:
        function()
    except UserError as e:
        return str(e)
    return "none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def written(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, f"{HERE}:write", folder=str(folder))


@pytest.fixture(scope="module")
def on_two(written: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, f"{HERE}:read_two_ranks", written=written[0], folder=str(folder))


@pytest.fixture(scope="module")
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of 6 MiB, or None where we may not mount one."""
    place = folder / "small disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    yield place if mounted else None
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def on_one(written: list[dict[str, Any]], on_two: list[dict[str, Any]], small_disk: Path | None) -> dict[str, Any]:
    disk = str(small_disk) if small_disk else None
    return run_ranks(1, f"{HERE}:read_one_rank", written=written[0], back=on_two[0], disk=disk)[0]


def close(a: list[list[float]], b: list[list[float]]) -> bool:
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return bool(((x - y).abs().amax(0) <= 1e-5 * y.abs().amax(0)).all())


@pytest.mark.parametrize("name", SAVED)
def test_a_fresh_process_goes_on_bit_for_bit(name: str, written: list[Any], on_two: list[Any]) -> None:
    for rank in range(2):
        for what in ("saved", "curve", "then"):
            assert on_two[rank][name][what] == written[rank][name][what], f"rank {rank}: {what} differs"


@pytest.mark.parametrize("name", RESHAPED)
def test_another_layout_goes_on_within_rounding(name: str, written: list[Any], on_two: list[Any]) -> None:
    assert close(on_two[0][name]["curve"], written[0][RESHAPED[name][0]]["curve"])


@pytest.mark.parametrize("name", ["fp32 zero1", "fp32 zero3", "tp2 zero1"])
def test_two_ranks_checkpoint_goes_on_alone(name: str, written: list[Any], on_one: dict[str, Any]) -> None:
    assert close(on_one[name]["curve"], written[0][name]["curve"])


@pytest.mark.parametrize("name", RESHAPED)
def test_a_checkpoint_that_changed_layout_on_its_way_is_the_same(
    name: str, written: list[Any], on_one: dict[str, Any]
) -> None:
    direct = on_one[RESHAPED[name][0]]
    assert on_one[f"{name} -> one rank"] == direct, "a reshape through another layout lost bits"


def test_one_rank_that_cannot_write_stops_all(on_two: list[Any]) -> None:
    """The last checkpoint stays."""
    for got in (answer["one rank's disk is full"] for answer in on_two):
        assert "File too large" in got["error"] and "rank 1" in got["error"] and "\n" not in got["error"]
        assert got["latest"] == got["first"] and got["left"] == ["latest", got["first"]]
        assert got["loads"]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(small_disk: Path | None, on_one: dict[str, Any]) -> None:
    if small_disk is None:
        pytest.skip("may not mount a tmpfs here: needs root")
    got = on_one["full disk"]
    assert "No space left on device" in got["error"] and "run.dir" in got["error"] and "\n" not in got["error"]
    assert got["latest"] == got["left"][-1] and got["left"][0] == "latest", got["left"]
    assert not any(name.endswith(".tmp") for name in got["left"])
    assert got["loads"]


def test_a_checkpoint_of_another_model_names_what_differs(on_one: dict[str, Any]) -> None:
    error = on_one["other model"]
    assert "model.n_layer=2 (here 4)" in error and "model.vocab_size=2500 (here 300)" in error
    assert "n_head" not in error and "\n" not in error


def test_a_checkpoint_of_other_attention_names_what_differs(on_one: dict[str, Any]) -> None:
    dense, narrower = on_one["other attention"]
    assert "another model: model.attention=DB (here D), model.band=5 (here None): give its model=" in dense
    assert "another model: model.band=5 (here 4): give its model=" in narrower


def test_assembled_weights_have_their_true_shapes(on_one: dict[str, Any]) -> None:
    shapes = on_one["assembled"]
    assert shapes["wte.weight"] == [2500, 42] and shapes["h.0.attn.c_attn.weight"] == [126, 42]
    assert len(shapes) == 28


def test_the_folder_opens_in_transformers_as_it_is(written: list[Any], on_one: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(written[0]["tp2 zero1"]["path"]).eval()
    tokens = run.windows(0, 2500).tokens[:2]
    with torch.no_grad():
        want = theirs(tokens).logits
    got = torch.tensor(on_one["logits"])
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_files_can_be_read_by_others_as_umask_says(written: list[Any]) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for file in Path(written[0]["fp32 zero1"]["path"]).iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name


@pytest.fixture
def copy(written: list[Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0]["fp32 zero1"]["path"], tmp_path / "copy"))


@pytest.mark.parametrize("name", ["weights-00001.safetensors", "state.json", "index.json"])
def test_a_flipped_byte_is_found_and_its_file_named(copy: Path, name: str) -> None:
    from trainer.checkpoint.load import assemble

    body = bytearray((copy / name).read_bytes())
    body[len(body) // 2] ^= 1
    (copy / name).write_bytes(body)
    with pytest.raises(UserError, match=name):
        assemble(copy)


@pytest.mark.parametrize("name", ["moments-00001.safetensors", "weights-00000.safetensors", "index.json", "state.json"])
@pytest.mark.parametrize("defect", ["missing", "short"])
def test_an_incomplete_checkpoint_is_refused_by_its_manifest(copy: Path, name: str, defect: str) -> None:
    from trainer.checkpoint.find import read_state

    if defect == "missing":
        (copy / name).unlink()
    else:
        os.truncate(copy / name, 100)
    with pytest.raises(UserError, match=f"{name} (is missing|has 100 bytes)"):
        read_state(copy)


def lie(copy: Path, name: str, change: Any) -> None:
    """Change a JSON file and make the manifest agree: what a hostile checkpoint looks like."""
    import hashlib

    body = json.loads((copy / name).read_text())
    change(body)
    (copy / name).write_text(json.dumps(body))
    manifest = json.loads((copy / "manifest.json").read_text())
    raw = (copy / name).read_bytes()
    manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))


LIES: dict[str, tuple[str, Any]] = {
    "a model that fills the memory": ("state.json", lambda b: b["model"].update(n_layer=10**9)),
    "a vocabulary that fills the memory": ("state.json", lambda b: b["model"].update(vocab_size=10**12)),
    "a model without numbers": ("state.json", lambda b: b["model"].update(n_layer="2")),
    "a fragment longer than its file": ("index.json", lambda b: b["ranks"][0]["fragments"][0].__setitem__(2, 10**12)),
    "a gap": ("index.json", lambda b: b["ranks"][0]["fragments"].pop()),
    "a file elsewhere": ("index.json", lambda b: b["ranks"][0].update(weights="../../../etc/passwd")),
    "a list where an object should be": ("index.json", lambda b: b.update(ranks=[[]])),
    "no tensor parallel size": ("index.json", lambda b: b.pop("tp")),
    "another tensor parallel size": ("index.json", lambda b: b.update(tp=10**9)),
    "a parameter that is not there": ("index.json", lambda b: b["parameters"].pop("wpe.weight")),
    "a parameter of another shape": ("index.json", lambda b: b["parameters"]["wpe.weight"].update(shape=[4, 4])),
    "a parameter split along no dimension": ("index.json", lambda b: b["parameters"]["wpe.weight"].update(tp_dim=7)),
    "a head without fragments": (
        "index.json",
        lambda b: b["parameters"].update(head={"shape": [10**9], "padded": [10**9], "tp_dim": None}),
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_checkpoint_that_lies_is_refused_and_exhausts_nothing(copy: Path, name: str) -> None:
    from trainer.checkpoint.load import assemble

    file, change = LIES[name]
    lie(copy, file, change)
    with pytest.raises(UserError, match="damaged"):
        dict(assemble(copy))


def test_a_manifest_that_names_files_elsewhere_is_refused(copy: Path) -> None:
    from trainer.checkpoint.find import read_state

    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a file name"):
        read_state(copy)


def write_four_ranks(folder: str) -> dict[str, Any]:
    return {
        f"zero{zero}": after_saving(run.config(tp=2, sequence_parallel=True, zero=zero), Path(folder) / f"four {zero}")
        for zero in (1, 3)
    }


def read_four_ranks(two: dict[str, Any], four: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for zero in (1, 3):
        cfg = run.config(tp=2, sequence_parallel=True, zero=zero)
        for name, path in (
            (f"exact zero{zero}", four[f"zero{zero}"]["path"]),
            (f"from dp2 to zero{zero}", two["path"]),
        ):
            with run.layout(tp=2) as mesh:
                engine = run.build(cfg, mesh, seed=1, load=Path(path))
                out[name] = {"saved": run.digest(engine), **going_on(engine)}
    return out


def read_from_four(four: dict[str, Any], zero: int) -> dict[str, Any]:
    with run.layout() as mesh:
        return {
            name: going_on(run.build(run.config(zero=zero), mesh, seed=1, load=Path(four[name]["path"])))
            for name in four
        }


@pytest.mark.long
@pytest.mark.slow
def test_four_ranks_reshape_to_two_and_one_and_back(written: list[Any], tmp_path: Path) -> None:
    four = run_ranks(4, f"{HERE}:write_four_ranks", folder=str(tmp_path))
    for world_size, zero in ((1, 1), (2, 3)):
        got = run_ranks(world_size, f"{HERE}:read_from_four", four=four[0], zero=zero)[0]
        for name in four[0]:
            assert close(got[name]["curve"], four[0][name]["curve"])
    back = run_ranks(4, f"{HERE}:read_four_ranks", two=written[0]["fp32 zero3"], four=four[0])
    for zero in (1, 3):
        assert close(back[0][f"from dp2 to zero{zero}"]["curve"], written[0]["fp32 zero3"]["curve"])
        for rank in range(4):
            for what in ("saved", "curve", "then"):
                assert back[rank][f"exact zero{zero}"][what] == four[rank][f"zero{zero}"][what]
