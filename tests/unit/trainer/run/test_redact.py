"""What looks secret is refused in a config and cut from all that is told; what does not look so stays as it is."""

from __future__ import annotations

import json
import secrets
import string
from dataclasses import asdict
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import load
from docs.generate_config import ROOTS
from tests.test_configs import NEEDED
from trainer.config.pretrain import PretrainConfig
from trainer.run.environment import gather
from trainer.run.folder import RunFolder
from trainer.run.redact import HIDDEN, redact, redact_command, redact_tree, refuse_secrets, secret_name


def letters(n: int) -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(n))


HIDING = {  # {} is the secret
    "a URL's user": "https://me:{}@host/mlflow?x=1",
    "a database": "postgresql+psycopg://me:{}@db.example:5432/m",
    "in a sentence": "HTTPConnectionPool(host='h'): http://u:{}@h/ refused, then more",
    "a query": "https://h/a?token={}&b=2",
    "a signature": "https://h/a?sv=2020&sig={}",
    "a pair": "MLFLOW_TRACKING_PASSWORD={} python -m x",
    "an option": "curl --token {} https://h",
    "a header": "pipe:curl -H 'Authorization: Bearer {}' https://h/{{}}",
    "json": "api_key: {}, more",
}


@pytest.mark.parametrize("text", HIDING.values(), ids=list(HIDING))
def test_a_secret_is_cut_out_of_a_text(text: str) -> None:
    secret = letters(24)
    assert secret in text.format(secret) and secret not in redact(text.format(secret))
    assert HIDDEN in redact(text.format(secret))


@pytest.mark.parametrize(
    "prefix", ["AKIA", "hf_", "sk-", "ghp_", "github_pat_", "glpat-", "xoxb-"], ids=lambda prefix: prefix
)
def test_a_token_of_a_known_make_is_cut_wherever_it_stands(prefix: str) -> None:
    token = prefix + ("".join(secrets.choice(string.ascii_uppercase) for _ in range(16)) if prefix == "AKIA" else "")
    token += "" if prefix == "AKIA" else letters(30)
    assert redact(f"run {token}, then") == f"run {HIDDEN}, then"
    with pytest.raises(UserError, match=r"^run.name holds what looks like") as caught:
        refuse_secrets({"run": {"name": f"a {token} b"}})
    assert token not in str(caught.value)


def test_names_that_look_secret_and_names_that_do_not() -> None:
    yes = "HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY db.password apiKey MLFLOW_TRACKING_PASSWORD PGPASSWORD token"
    no = "tokens_per_step data.tokens tokenizer n_ctx CUDA_HOME keep monkey OMP_NUM_THREADS author MASTER_PORT"
    assert [name for name in yes.split() if not secret_name(name)] == []
    assert [name for name in no.split() if secret_name(name)] == []


@pytest.mark.parametrize("root", ROOTS)
def test_no_config_of_ours_looks_secret(root: str) -> None:
    body = asdict(load(ROOTS[root], NEEDED[root]))
    refuse_secrets(body)
    assert json.dumps(redact_tree(body), default=str) == json.dumps(body, default=str)


def test_texts_without_a_secret_stay() -> None:
    for text in (
        "s3://bucket/a b/c?versionId=3",
        "sqlite:////a/b.db",
        "postgresql://me@host/db",
        "step 3: 4,096 tokens, tokenizer gpt2, keys: 7",
        "/runs/sk-learn/hf_models",
        "pipe:curl --netrc -s https://h/{}",
        "ssh://git@host:22/x",
    ):
        assert redact(text) == text


def test_a_command_line_is_told_without_its_secrets() -> None:
    a, b, c = (letters(20) for _ in range(3))
    told = redact_command(["python", "-m", "x", f"db.password={a}", "--token", b, f"uri=http://u:{c}@h", "optim.lr=1"])
    assert told == [
        "python",
        "-m",
        "x",
        f"db.password={HIDDEN}",
        "--token",
        HIDDEN,
        f"uri=http://{HIDDEN}@h",
        "optim.lr=1",
    ]


@pytest.mark.parametrize(
    "value", ["run.name=https://a:{}@h/x", "data.path='pipe:curl -H \"Authorization: Bearer {}\" {{}}'"]
)
def test_a_config_with_a_secret_is_refused_before_it_is_frozen(value: str) -> None:
    secret = letters(24)
    cfg = load(PretrainConfig, ["data.path=d", "max_steps=10", value.format(secret)])
    with pytest.raises(UserError, match="holds what looks like a password") as caught:
        refuse_secrets(asdict(cfg))
    assert secret not in str(caught.value)


def test_the_environments_secrets_do_not_reach_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {name: letters(24) for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "CUDA_API_KEY", "MY_INNOCENT")}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG_FILE", url := f"http://me:{(inside := letters(24))}@h/x")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "trainer.pretrain", f"tracking.uri={url}"])
    told = gather(RunFolder(tmp_path))
    text = json.dumps(told)
    assert [name for name, value in {**planted, "": inside}.items() if value in text] == []
    assert told["environment"]["NCCL_DEBUG"] == "INFO" and told["environment"]["HF_TOKEN"] == HIDDEN
    assert told["packages"]["torch"] and "MY_INNOCENT" not in text
