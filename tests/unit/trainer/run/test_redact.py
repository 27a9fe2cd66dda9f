"""What looks secret is refused in a config and cut from all that is told; what does not look so stays as it is."""

from __future__ import annotations

import json
import secrets
import string
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import load
from docs.generate_config import ROOTS
from tests.test_configs import NEEDED
from trainer.config.pretrain import PretrainConfig
from trainer.run.environment import gather, store
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
    "a key's header": 'curl -H "X-Api-Key: {}" https://h',
    "curl's user": "curl -s -u name:{} https://h",
    "its long form": "curl --user 'name:{}' https://h",
    "a cookie": "Cookie: a=b; session={}; c=d",
    "a quoted cookie": "pipe:curl -H 'Cookie: sid={}' https://h/{{}}",
    "sshpass": "sshpass -p {} ssh host",
    "sshpass in one word": "sshpass -p{} ssh host",
    "a token as a user": "git clone https://{}@github.com/a/b",
    "an object": '{{"user": "me", "password": "{}"}}',
    "an escaped object": '{{\\"password\\": \\"a b {}\\"}}',
    "Python's object": "{{'token': '{}'}}",
    "an account's key": "DefaultEndpointsProtocol=https;AccountKey={};EndpointSuffix=y",
    "a key of PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{}\n-----END PGP PRIVATE KEY BLOCK-----\nafter",
    "a key of ssh": "-----BEGIN OPENSSH PRIVATE KEY-----\n{}",
    "an assignment": 'PASSWORD: str = "{}"',
    "a function's word": "login(token='{}')",
    "an item": 'os.environ["HF_TOKEN"] = "{}"',
    "a shell": "export WANDB_API_KEY={}",
    "csh": "setenv HF_TOKEN {}",
    "an inner pair": "--from-literal=password={}",
    "netrc": "machine h login me password {}",
    "a signed address": "https://s3/x?X-Amz-Signature={}",
    "a code by chance": "https://h/x?code={}",
    "an @ in a password": "https://me:a@{}@h/x",
    "a database's words": "Server=h;User=u;Password={};",
    "mysql": "mysql -uroot -p{} db",
    "GitHub's header": "authorization: token {}",
}


@pytest.mark.parametrize("text", HIDING.values(), ids=list(HIDING))
def test_a_secret_is_cut_out_of_a_text(text: str) -> None:
    secret = letters(24) + "aB3dE5"
    assert secret in text.format(secret) and secret not in redact(text.format(secret))
    assert HIDDEN in redact(text.format(secret))


@pytest.mark.parametrize(
    "prefix",
    [*"AKIA hf_ sk- ghp_ github_pat_ glpat- xoxb- nvapi- npm_ pypi- ya29. SG. glsa_ newmake_ sq0-v1-".split()],
    ids=lambda prefix: prefix,
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
        "https://h/x?code=1",
        "error: secret is missing",
        'pipe:curl -H "Authorization: Bearer $TOKEN" https://h/{}',
        "export HF_TOKEN=$(cat ~/.token) PASSWORD=${PW}",
        "docker run -u 1000:1000 image",
        "/home/me/hf_modelsForGPT2/GPT2Small2024ExperimentFinal step-00000100.gen-0001",
        "password: str | None = None",
        "token = get_token(), auth: bool = False, eos_token_id=eot, token: 50256",
        "ValueError: unexpected token: found",
    ):
        assert redact(text) == text


def test_a_command_line_is_told_without_its_secrets() -> None:
    a, b, c = (letters(20) for _ in range(3))
    told = redact_command(["python", "-m", "x", f"db.password={a}", "--token", b, f"uri=http://u:{c}@h", "optim.lr=1"])
    assert redact_command(["sshpass", "-p", "a b", "curl", "-u", f"me:{a}"]) == [
        "sshpass",
        "-p",
        HIDDEN,
        "curl",
        "-u",
        HIDDEN,
    ]
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
    store(RunFolder(tmp_path), 1)
    assert (tmp_path / "environment/0001.json").stat().st_mode & 0o777 == 0o600


def test_a_redacted_text_keeps_its_lines_and_its_speed() -> None:
    """A patch is cut line by line, and 8 MiB of one must not hold a start up; nothing is quadratic in a long line."""
    key = "+-----BEGIN RSA PRIVATE KEY-----\n+abc\n+-----END RSA PRIVATE KEY-----"
    assert redact(f"@@ -1,4 +1,4 @@\n {key}\n+ok").count("\n") == 4 and "abc" not in redact(key)
    for piece in ("curl -a ", "a=", "token: ", "://:", "-----BEGIN PRIVATE KEY-----", '"', "a" * 50 + " "):
        started = time.process_time()
        redact(piece * ((1 << 18) // len(piece)))
        assert time.process_time() - started < 30, piece
