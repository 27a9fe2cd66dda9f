"""Which rank this process is, from what the launchers set."""

from __future__ import annotations

import os
import socket

import pytest

from conf.errors import UserError
from trainer.distributed.world import World, read_world

MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
KEYS = (*MPI, *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.setenv(key, "")  # remembered, so that what read_world sets is undone after the test
        monkeypatch.delenv(key)


def test_a_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert read_world() == World(rank=5, world_size=8, local_rank=1)
    assert not read_world().is_main


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun's and DeepSpeed's
def test_the_ranks_of_the_node_are_counted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for key, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", name: "4"}.items():
        monkeypatch.setenv(key, value)
    assert read_world() == World(rank=5, world_size=8, local_rank=1, local_world_size=4)
    for wrong in ("1", "9"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(UserError, match=f"WORLD_SIZE=8, .*{name}={wrong}: .*start with torchrun or deepspeed"):
            read_world()


def test_mpiruns_numbers_are_read_where_rank_0_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in MPI.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"RANK in the environment but not MASTER_ADDR, MASTER_PORT: .* with -x"):
        read_world()
    monkeypatch.setenv("MASTER_ADDR", "h1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert read_world() == World(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("5", "h1")  # torch finds them too


def test_alone_it_is_a_world_of_one_with_a_port_that_is_free() -> None:
    world = read_world()
    assert world == World(0, 1, 0) and world.is_main
    with socket.socket() as s:
        s.bind((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    assert read_world() == world  # a second look sees the same


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "0"}, "RANK in the environment but not WORLD_SIZE, LOCAL_RANK: start with torchrun or deepspeed"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE in the environment but not LOCAL_RANK"),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"},
            "WORLD_SIZE='two', LOCAL_RANK='0': these must be integers",
        ),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str) -> None:
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        read_world()
