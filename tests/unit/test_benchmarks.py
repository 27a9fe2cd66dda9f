"""The benchmarks run and say all that they promise; how fast anything is, no test decides."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.benchmarks import attention, checkpoint, corpus, extraction, sampling, tracking, train_speed
from tests.benchmarks.loader import main

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *args: object, timeout_s: float = 240) -> str:
    argv = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, args)]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = run(
        "loader", "tokens=200_000", "rounds=1", "engines=ours,memmap", f"dir={tmp_path_factory.mktemp('c') / 'd'}"
    )
    assert found.count("\n") == 1
    return json.loads(found)


def test_the_loader_benchmark_prints_every_number_of_each_engine(loader: dict[str, Any]) -> None:
    assert {key: loader[key] for key in ("tokens", "timed_tokens", "rounds", "absent")} == {
        "tokens": 200_000,
        "timed_tokens": 160_000,
        "rounds": 1,
        "absent": [],
    }
    assert set(loader) >= {"benchmark", "seed", "hardware", "load", "versions"}
    assert set(loader["hardware"]) == {"cpu", "cores", "memory_gib"}
    assert all(loader["versions"][p] for p in ("python", "torch", "numpy", "webdataset"))
    for numbers in loader["engines"].values():
        rates = ("tokens_per_cpu_s", "tokens_per_s", "first_batch_s", "resume_s", "peak_mib", "bytes_per_token")
        assert all(numbers[key] > 0 for key in rates) and set(numbers) == {*rates, "resume_exact"}
    ratios = loader["ratios"]["memmap"]
    ours, peer = loader["engines"]["ours"], loader["engines"]["memmap"]
    assert set(ratios) == {"tokens_per_cpu_s", "tokens_per_s", "first_batch_s", "resume_s"}
    assert all(ratio == pytest.approx(ours[key] / peer[key]) for key, ratio in ratios.items())


def test_what_is_resumed_in_the_middle_is_what_was_served_there(loader: dict[str, Any]) -> None:
    assert [numbers["resume_exact"] for numbers in loader["engines"].values()] == [True, True]


def test_the_table_is_printed_from_the_result(
    loader: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found.json").write_text(json.dumps(loader))
    main(["--markdown", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in lines[2:4]] == ["`ours`", "`memmap`"]
    assert f"{loader['engines']['ours']['bytes_per_token']:.3f}" in lines[2].split(" | ")
    assert loader["hardware"]["cpu"] in lines[-1] and "200,000 tokens" in lines[-1]


def test_the_scale_benchmark_runs() -> None:
    """It finds each shard read by at most two ranks."""
    found = json.loads(run("scale", "shards=300", "tokens=60_000_000", "ranks=8"))
    assert found["ranks_per_shard"] <= 2
    assert 1 <= found["imbalance"] < 1.2 and 1 <= found["fetched_over_stored"] < 1.2
    for key in ("start_s", "start_cpu_s", "start_mib", "seek_s"):
        assert 0 < found[key]["median"] <= found[key]["most"]


def test_the_extraction_benchmark_prints_all_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of each engine."""
    pytest.importorskip("resiliparse", reason="the corpus extra is not installed")
    text = "The river rose for three days, and on the fourth the people carried what they had up the hill. " * 3
    (tmp_path / "html").mkdir()
    for name in "ab":
        html = f"<nav>Home</nav><article><p>{name} {text}</p></article>".encode()
        (tmp_path / "html" / f"{name}.html.gz").write_bytes(gzip.compress(html))
    (tmp_path / "ground-truth.json").write_text(json.dumps({n: {"articleBody": f"{n} {text}"} for n in "ab"}))
    printed = run("extraction", f"gold={tmp_path}", "rounds=1", "engines=fast,resiliparse")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert (found["pages"], found["rounds"], found["benchmark"]) == (2, 1, "extraction")
    assert set(found) >= {"bytes", "hardware", "load", "versions"}
    for numbers in found["engines"].values():
        assert set(numbers) == set(extraction.COLUMNS) and all(value > 0 for value in numbers.values())
        assert numbers["f1"] == 1
    fast, peer = (found["engines"][name]["pages_per_cpu_s"] for name in ("fast", "resiliparse"))
    assert found["ratios"] == {"fast": pytest.approx(fast / peer)}
    (tmp_path / "found.json").write_text(printed)
    extraction.main(["--markdown", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in lines[2:4]] == ["`fast`", "`resiliparse`"] and "2 pages" in lines[-1]


def test_the_corpus_benchmark_measures_both_sides_of_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = Random(0)
    words = [f"word{i}" for i in range(300)]
    (tmp_path / "a.txt").write_text(" ".join(rng.choices(words, k=20_000)))
    rows = "MinHash signatures,tokenize"
    found = json.loads(
        run("corpus", f"warcs={tmp_path}", f"texts={tmp_path}", "rounds=1", "documents=8", f"only={rows}")
    )
    assert found["benchmark"] == "corpus" and set(found["rows"]) == set(rows.split(","))
    signatures, tokens = found["rows"].values()
    assert signatures["ours"]["ratio"] == pytest.approx(
        signatures["ours"]["mb_per_cpu_s"] / signatures["datatrove"]["mb_per_cpu_s"], rel=0.1
    )
    assert tokens["ours"]["kept"] == tokens["tiktoken"]["kept"]  # a hash of all ids
    (tmp_path / "found.json").write_text(json.dumps(found))
    corpus.main(["--markdown", str(tmp_path / "found.json")])
    assert capsys.readouterr().out.count("\n| ") == 4


@pytest.mark.slow
def test_the_attention_benchmark_measures_patterns_and_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run("attention", "json=true", "contexts=128,256", "tokens=256", "rounds=1")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found["benchmark"] == "attention" and set(found) >= {"device", "hardware", "load", "versions", "seed"}
    contexts = [row["context"] for row in found["attention"]]
    assert len(contexts) == 2 * contexts.count(128) == 2 * contexts.count(256) > 6
    for row in found["attention"]:
        peer = next(other for other in found["attention"] if other["context"] == row["context"])
        assert row["ratio"] == pytest.approx(peer["ms"] / row["ms"])
        assert 0 < row["visible"] <= row["blocks"] <= 1 and (row["visible"] == 1) is row["kernel"].startswith(
            ("d", "D")
        )
    block = found["block"]
    assert block["ratio"] == pytest.approx(block["dense_ms"] / block["banded_ms"])
    (tmp_path / "found.json").write_text(printed)
    attention.main(["--markdown", str(tmp_path / "found.json")])
    assert capsys.readouterr().out.count("\n| ") == len(contexts) + 1


def test_the_engine_benchmark_counts_operations_by_group() -> None:
    """There is no operation for each parameter."""
    found = json.loads(run("engine_work", "layers=4", "steps=1", "json=true"))
    assert found["parameters"] == 4 * 12 + 4
    assert found["ours"]["ops"]["step"] < found["parameters"] and found["ratio"]["ops"] < 1
    assert {"hardware", "load", "versions", "ratio"} <= set(found)


def test_the_sampling_benchmark_measures_texts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("sampling", "model=test", "prompts=4", "longest=8", "new=2", "rounds=1")
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert result["benchmark"] == "sampling" and set(result) >= {"device", "hardware", "load", "versions", "seed"}
    assert [row["prompts"] for row in result["texts"]] == ["one length", "4 lengths", "one by one"]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in result["texts"])
    assert all(row["ms"] > 0 for row in result["draws"]) and result["draws"][0]["ratio"] == 1
    (tmp_path / "result.json").write_text(printed)
    sampling.main(["--markdown", str(tmp_path / "result.json")])
    assert "| one by one |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_evaluation_benchmark_finds_equal_answers() -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    printed = run("evaluation_speed", "models=4_layers", "documents=2", "rounds=1", "batch_size=3", "piqa=none")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert set(found) >= {"hardware", "load", "versions", "seed"} and found["texts"] == "random words"
    assert [(row["pairs"], row["bar"]) for row in found["rows"]] == [(4, 1.3), (4, 2.0), (8, 3.0)]
    for row in found["rows"]:
        assert row["apart"] <= 1e-6 and row["greedy_equal"] is True
        assert row["ratio"] == pytest.approx(row["cpu_s"]["lm_eval"] / row["cpu_s"]["ours"], rel=0.01)


@pytest.mark.slow
def test_the_scaling_benchmark_measures_every_layout() -> None:
    found = json.loads(run("scaling_cpu", "ranks=1,2", "steps=1", "rounds=1", "width=32", "json=true"))
    assert [(r["dp"], r["tp"]) for r in found["rows"]] == [(1, 1), (2, 1), (1, 2)]
    assert found["rows"][0]["efficiency"] == 1 and all(r["tokens_per_s"] > 0 for r in found["rows"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_tracking_benchmark_prints_step_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of each server, and the slowest call."""
    pytest.importorskip("mlflow", reason="the tracking extra is not installed")
    printed = run("tracking", "rounds=1", "steps=9", timeout_s=500)
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert set(found) >= {"hardware", "load", "versions", "spread_ms", "mean_ms"} and found["log_calls"] >= 2 * 9
    assert all(found["step_ms"][mode] > 0 for mode in tracking.MODES) and found["log_worst_ms"] > 0
    for mode in ("healthy", "stopped"):
        assert found["ratios"][mode] == pytest.approx(found["step_ms"][mode] / found["step_ms"]["none"], rel=0.01)
    (tmp_path / "found.json").write_text(printed)
    tracking.main(["--markdown", str(tmp_path / "found.json")])
    assert f"| a server that hangs | {found['step_ms']['stopped']:.2f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_checkpoint_benchmark_finds_equal_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints its ratios."""
    printed = run("checkpoint", "model=test", "rounds=1", "n_ctx=16", f"dir={tmp_path}", "json=true")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found["benchmark"] == "checkpoint" and found["bit_equal"] is True and found["bytes"] > 10**6
    assert set(found) >= {"hardware", "load", "versions", "device", "steps_beside", *checkpoint.SECONDS}
    assert all(found[key] > 0 for key in ("blocking_s", "stall_s", "write_s", "step_s", "load_s"))
    assert found["stall_share"] == pytest.approx(found["stall_s"] / found["blocking_s"], rel=0.05)
    assert found["ratios"]["blocking_over_torch_save"] == pytest.approx(
        found["blocking_s"] / found["torch_save_s"], rel=0.05
    )
    (tmp_path / "found.json").write_text(printed)
    checkpoint.main(["--markdown", str(tmp_path / "found.json")])
    assert f"| {found['blocking_s']:.2f} s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_fp32_benchmark_trains_both_sides_alike() -> None:
    found = json.loads(run("fp32_speed", "model=test", "rounds=1", "steps=1"))
    assert found["loss_apart"] < 1e-5 and found["ratio"] <= found["ratio_upper_95"]
    assert found["ratio"] == pytest.approx(found["cpu_ms"]["ours"] / found["cpu_ms"]["plain"], rel=0.01)


def test_the_page_of_fp32_says_what_its_last_line_says() -> None:
    page = (ROOT / "docs/benchmarks/fp32_speed.md").read_text()
    *_, last = (json.loads(line) for line in page.splitlines() if line.startswith("{"))
    steps = last["settings"]["steps"]
    assert f"`steps={steps}`, says {last['ratio']:.2f} and at most {last['ratio_upper_95']:.2f}" in page


@pytest.mark.slow
def test_the_training_benchmark_measures_each_side_of_a_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("sizes=test", "steps=2", "warmup=1", "rounds=1", "fp8=true", "--profile", "json=true")
    printed = run("train_speed", *given)
    assert printed.count("\n") == 1
    found = json.loads(printed)
    size = found["sizes"]["test"]
    assert set(size["sides"]) == {"ours", "fp8", "plain"} and size["parameters"] == 36096 and size["profile"]
    for side in size["sides"].values():
        assert all(side[key] > 0 for key in ("ms", "host_ms", "tokens_per_s", "mfu", "compile_s"))
        assert side["loss"] == pytest.approx(5.7, abs=0.4)  # log 300: nothing is to be learnt of random tokens
    rates = {name: side["tokens_per_s"] for name, side in size["sides"].items()}
    assert size["ratios"]["ours/plain"] == pytest.approx(rates["ours"] / rates["plain"])
    (tmp_path / "found.json").write_text(printed)
    train_speed.main(["--markdown", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[3] for line in lines[2:5]] == ["ours", "fp8", "plain"]


def test_the_training_benchmark_takes_both_forms_of_settings() -> None:
    given = train_speed.settings(["sizes=test", "--cap-gib", "24", "--profile", "fp8=true"])
    assert (given["sizes"], given["cap_gib"], given["profile"], given["fp8"]) == ("test", "24", "true", "true")
    assert train_speed.settings(["--fp8-equality"])["fp8_equality"] == "true"
    for wrong in ("size=124M", "sizes=125M"):
        with pytest.raises(SystemExit, match=wrong.partition("=")[2 if "125M" in wrong else 0]):
            train_speed.settings([wrong])
