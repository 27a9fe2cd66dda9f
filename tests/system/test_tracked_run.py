"""The real entry with a real MLflow server: what is stored of a run, its registered model, and no secret anywhere."""

from __future__ import annotations

import json
import secrets
import signal
from pathlib import Path

import pytest

from conf.frozen import thaw
from tests.helpers.ranks import free_port
from tests.system.runs import finish, letters, make_data, start
from tests.system.tracked import client_of, counted, logged, needs_mlflow, signal_group, start_server
from trainer.config.pretrain import PretrainConfig
from trainer.run.folder import RunFolder

pytestmark = needs_mlflow


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_stored_whole_and_no_secret_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is stored whole and registered; no byte of a secret is in any file."""
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_API_KEY", "MLFLOW_TRACKING_PASSWORD", "SOMEBODYS_OWN")
    planted = {name: f"planted-{secrets.token_hex(12)}" for name in names}
    planted["CUDA_PROXY"] = f"http://me:planted-{secrets.token_hex(12)}@proxy.example:8080"
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    port, root = free_port(), tmp_path / "runs" / "a"
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # MLflow's own variables count where the config says nothing
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the shell")
    server = start_server(tmp_path, port)
    try:
        data = letters(make_data(tmp_path / "data", vocab_size=257))
        given = [f"data.path={data}", "max_steps=9", "tracking=mlflow", "model.vocab_size=257"]
        given += ["eval.samples.prompts=[a, b]", "eval.samples.tokens=5"]
        given += ["tracking.register=tiny gpt", "tracking.system_s=0.05", "eval.every=3"]
        refused = finish(start(tmp_path / "no", *given, f"run.name=a hf_{secrets.token_hex(16)} b"))
        assert refused[0][0] == 2 and "run.name holds what looks like" in refused[0][1]
        assert not (tmp_path / "no").exists()
        [(code, err)] = finish(start(root, *given))
        assert code == 0, err[-3000:]

        folder, client = RunFolder(root), client_of(uri)
        state = json.loads((root / "tracking.json").read_text())
        run = client.get_run(state["run_id"])
        assert run.info.status == "FINISHED"
        assert client.get_experiment(run.info.experiment_id).name == "of the shell"
        frozen = thaw(folder.config, PretrainConfig).tracking
        assert (frozen.uri, frozen.experiment) == (uri, "of the shell"), "the run folder says where the numbers are"
        assert run.data.tags["mlflow.source.name"] == "trainer.pretrain"
        assert counted(client, state["run_id"]) == logged(root)
        keys = set(run.data.metrics)
        assert keys >= {"train/loss", "val/loss", "checkpoint/write_s", "system/cpu_percent"}
        latest = folder.latest()
        assert latest is not None
        names = [
            "config.yaml",
            "environment/0001.json",
            "samples/step-00000003.txt",
            "samples/step-00000009.txt",
            *(f"plots/{n}.png" for n in ("loss", "grad_norm", "throughput")),
        ]
        names += [f"checkpoints/{latest.name}/{n}" for n in ("manifest.json", "state.json")]
        for name in names:
            stored = Path(client.download_artifacts(state["run_id"], name, str(tmp_path)))
            assert stored.read_bytes() == (root / name).read_bytes()
        told = json.loads((root / "environment/0001.json").read_text())
        assert told["environment"]["NCCL_DEBUG"] == "WARN" and told["environment"]["HF_TOKEN"] == "***"
        assert run.data.tags.get("mlflow.source.git.commit") == told["code"].get("commit")  # none outside a checkout

        (version,) = client.search_model_versions("name = 'tiny gpt'")
        assert (version.run_id, version.status) == (state["run_id"], "READY")
        assert state["registered"] == f"tiny gpt/{version.version}", "it would ask the server again at each end"
        model = Path(client.download_artifacts(state["run_id"], "model", str(tmp_path)))
        assert {p.name for p in model.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
        assert all(p.read_bytes() == (latest / p.name).read_bytes() for p in model.iterdir())
    finally:
        signal_group(server, signal.SIGKILL)
    needles = [value.rpartition("planted-")[2].partition("@")[0].encode() for value in planted.values()]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "server.db" for path in files)
    assert [(path, needle) for path in files for needle in needles if needle in path.read_bytes()] == []
