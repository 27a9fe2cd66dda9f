"""Results of a node check from planted numbers: each is made ok, warn and fail."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from conf.schema import load
from launch.checks.nodes import command, gpus_of_a_node, read
from launch.config import DoctorConfig
from tests.helpers.seeds import seeded
from trainer.config.node_check import NodeCheckConfig, NodeRunConfig
from trainer.diagnostics.check_result import CheckResult, fail, ok
from trainer.diagnostics.node_results import group_result, measured_results, node_results
from trainer.diagnostics.node_store import nodes_of, ranges

NODES = [[0, 1], [2, 3]]
GPU = {"name": "H100", "memory.total": "81559", "memory.used": "1", "ecc.errors.uncorrected.volatile.total": "0"}


def rank(r: int, **changes: Any) -> dict[str, Any]:
    first = r % 2 == 0
    fact = {
        "host": f"n{r // 2}",
        "local_rank": r % 2,
        "addresses": [f"10.0.0.{r // 2}"],
        "loopback": False,
        "interface": "",
        "visible": None,
        "smi": [{**GPU, "index": str(i)} for i in range(2)] if first else [],
        "torch_gpus": 2,
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": [ok("/dev/shm", "8 GiB").as_json()] if first else [],
    }
    return fact | changes


def config(**values: Any) -> NodeCheckConfig:
    return NodeCheckConfig(NodeRunConfig("runs/a"), **{"gpus_per_node": 2, **values})


def states(findings: Any) -> dict[str, str]:
    return {f.name: f.state.value for f in findings}


def came(**changes: Any) -> list[dict[str, Any]]:
    """Four ranks on two nodes; the third, first of the second node, is changed."""
    return [rank(r, **(changes if r == 2 else {})) for r in range(4)]


def gpus(n: int, **changes: str) -> list[dict[str, str]]:
    return [{**GPU, "index": str(i), **changes} for i in range(n)]


def test_good_nodes_are_good() -> None:
    found = node_results(config(), came(), NODES, "n0:1")
    assert set(states(found).values()) == {"ok"}
    assert {"ranks", "versions", "host names", "/dev/shm", "GPUs", "GPU memory", "GPU errors"} == set(states(found))


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({"versions": {"python": "3.11", "torch": "2.12"}}, "versions", "fail", "torch is 2.12 on rank 2 (n1)"),
        ({"loopback": True, "addresses": ["127.0.1.1"]}, "host names", "warn", "n1 is 127.0.1.1"),
        ({"loopback": True, "interface": "eth0"}, "host names", "ok", ""),
        ({"torch_gpus": 1}, "GPUs", "fail", "n1: torch sees 1, nvidia-smi 2"),
        ({"smi": gpus(4), "torch_gpus": 2}, "GPUs", "fail", "nvidia-smi 4"),
        ({"smi": gpus(4), "torch_gpus": 2, "visible": "0,1"}, "GPUs", "ok", ""),
        ({"smi": gpus(2, name="A100")}, "GPUs", "warn", "A100 and H100"),
        ({"smi": gpus(2, **{"memory.used": "40000"})}, "GPU memory", "warn", "n1 GPU 1: 40000 MiB"),
        ({"smi": gpus(2, **{"memory.used": "[N/A]"})}, "GPU memory", "ok", ""),
        ({"smi": gpus(2, **{"ecc.errors.uncorrected.volatile.total": "3"})}, "GPU errors", "fail", "n1 GPU 0: 3"),
        ({"machine": [fail("/dev/shm", "absent", "mount it").as_json()]}, "/dev/shm", "fail", "absent, on n1"),
    ],
)
def test_what_one_node_says_of_itself(changes: dict[str, Any], name: str, state: str, words: str) -> None:
    [found] = [f for f in node_results(config(), came(**changes), NODES, "n0:1") if f.name == name]
    assert (found.state.value, words in found.text) == (state, True), found


def test_no_gpu_is_a_matter_of_what_is_asked_for() -> None:
    none = [rank(r, smi=[], torch_gpus=0) for r in range(4)]
    for asked, state in ((0, "ok"), (8, "warn")):
        assert states(node_results(config(gpus_per_node=asked), none, NODES, "n0:1"))["GPUs"] == state


def test_gpus_without_a_rank_are_not_good() -> None:
    facts = [rank(0, torch_gpus=2), rank(2, torch_gpus=2), rank(3)]
    [found] = [f for f in node_results(config(), facts, [[0], [1, 2]], "n0:1") if f.name == "GPUs"]
    assert found.state.value == "fail" and "n0: 1 ranks were started, 2 GPUs" in found.text


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURMD_NODENAME": "n1", "SLURM_GPUS_PER_NODE": "8"}, 4),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_GPUS_PER_NODE": "8"}, 8),  # of another job, around an salloc
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a:1,b:2"}, 3),
        ({"SLURM_GPUS_PER_NODE": "gpu:a100:4"}, 4),
        ({}, 6),  # salloc --gres, or whole nodes
    ],
)
def test_gpus_of_a_node_by_slurms_variables(env: dict[str, str], count: int) -> None:
    assert gpus_of_a_node({"SLURM_JOB_ID": "1", **env}, 6) == count


def measured(name: str, values: list[Any], **values_of_config: Any) -> list[CheckResult]:
    return list(measured_results(config(**values_of_config), came(), NODES, {name: values}))


def test_a_slow_gpu_and_a_wrong_one_are_named() -> None:
    rng = random.Random(seeded())
    typical = rng.uniform(100, 900)
    good = [{"error": 0.003, "tflops": typical * rng.uniform(0.95, 1.05), "device": "cuda"} for _ in range(4)]
    assert states(measured("matmul", good)) == {"matmul": "ok"}
    [slow] = measured("matmul", [*good[:3], good[3] | {"tflops": typical / 2}])
    assert slow.state.value == "warn" and "rank 3 (n1)" in slow.text
    [shared] = measured("matmul", [v | {"device": "cpu"} for v in [*good[:3], good[3] | {"tflops": typical / 2}]])
    assert shared.state.value == "ok"
    for error in (0.5, float("nan")):
        [wrong] = measured("matmul", [good[0], good[1] | {"error": error}, *good[2:]])
        assert wrong.state.value == "fail" and "rank 1 (n0)" in wrong.text
    [broken] = measured("matmul", [*good[:3], {"failed": "CUDA error: an ECC error"}])
    assert broken.state.value == "fail" and "rank 3 (n1): CUDA error" in broken.text


def reduced(gbit_s: float, *, right: bool = True) -> dict[str, Any]:
    return {"right": right, "gbit_s": gbit_s, "ranks": 2}


def test_a_slow_network_and_wrong_sums_are_named() -> None:
    """The rate between nodes is compared with `network_gbit`, if that is given; two ranks of a node share it."""
    fast = [{"inside": reduced(1600.0), "between": reduced(160.0)} for _ in range(4)]
    both = {"all-reduce inside a node": "ok", "all-reduce between the nodes": "ok"}
    assert states(measured("all-reduce", fast, network_gbit=400)) == both
    slow = [*fast[:3], {"inside": reduced(1600.0), "between": reduced(16.0)}]
    [_, result] = measured("all-reduce", slow, network_gbit=400)
    assert result.state.value == "warn" and "32.0 Gbit/s a node" in result.text and "rank 3 (n1)" in result.text
    assert states(measured("all-reduce", slow)) == both  # nothing to compare it with
    [wrong, _] = measured("all-reduce", [{"inside": reduced(8.0, right=False), "between": reduced(8.0)}, *fast[1:]])
    assert wrong.state.value == "fail" and "rank 0 (n0)" in wrong.text


def test_a_clock_is_off_only_beyond_the_error() -> None:
    """A skew counts only beyond the bound of its error."""
    for skew, error, state in ((0.2, 0.001, "ok"), (-1.5, 0.001, "warn"), (1.5, 0.7, "ok")):
        [found] = measured("clock", [{"2": (skew, error)}, {}, {}, {}])
        assert found.state.value == state
    assert states(measured("clock", [{}])) == {"clock": "ok"}


def test_a_run_folder_that_one_node_does_not_see() -> None:
    assert states(measured("disk", [True] * 4)) == {"run.dir": "ok"}
    [other] = measured("disk", [True, True, False, False])
    assert other.state.value == "fail" and other.text.endswith("on n1")
    [absent] = measured("disk", [True, True, {"failed": "FileNotFoundError"}, True])
    assert absent.state.value == "fail" and "rank 2 (n1): FileNotFoundError" in absent.text


def test_a_group_that_does_not_form_names_the_ranks() -> None:
    assert group_result(came(), [None] * 4).state.value == "ok"
    found = group_result(came(), [None, {"failed": "connectFullMesh"}, None, None])
    assert found.state.value == "fail" and "rank 1 (n0): connectFullMesh" in found.text


def test_ranks_are_numbered_node_by_node() -> None:
    assert nodes_of([0, 1, 0, 1, 2, 0]) == [[0, 1], [2, 3, 4], [5]]
    assert ranges([7, 0, 1, 2]) == "0-2, 7" and ranges([]) == "none"


def test_the_launcher_of_an_allocation_and_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "runs/a b'\"$(touch x)${run.name}"
    cfg = load(
        DoctorConfig, ["cluster=slurm", "node=true", r"run.dir=runs/a b'\"$(touch x)\${run.name}", "timeout_s=7"]
    )
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    here = command(cfg)
    assert here[1:4] == ["-m", "torch.distributed.run", "--standalone"] and "--nproc-per-node=2" in here
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "8")
    there = command(cfg)
    assert there[0] == "srun" and {"--nodes=4", "--ntasks=32", "--gpus-per-node=8"} <= set(there)
    at = there.index("trainer.diagnostics.node_check")
    checked = load(NodeCheckConfig, there[at + 1 :])
    assert Path(checked.run.dir) == Path(cfg.run.dir).absolute()
    assert checked.gpus_per_node == 8 and checked.network_gbit == 400 and checked.timeout_s == 7
    assert hostile.split("/")[1][:3] in checked.run.dir


def test_what_libraries_print_hides_no_findings() -> None:
    assert read('NCCL version 2\n{"findings": [{"name": "a", "state": "ok", "found": "b", "cure": ""}]}\n[1]\n') == [
        ok("a", "b")
    ]
    assert read("nothing\n") is None
