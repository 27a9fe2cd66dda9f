"""nanoGPT's ckpt.pt: its logits by a forward pass of its own, and files that are refused with nothing run."""

from __future__ import annotations

import os
import random
import stat
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import train_bpe
from tests.helpers.seeds import seeded
from trainer.checkpoint.find import model_of
from trainer.config.hf import ImportHfConfig
from trainer.export_hf import our_logits
from trainer.foreign.nanogpt import NanoGptFile
from trainer.import_hf import import_hf
from trainer.run.folder import RunFolder

ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": True, "vocab_size": 320, "dropout": 0.1}


def nanogpt_weights(args: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by nanoGPT's names and shapes, the head tied as there; gains and biases show."""
    c, out = args["n_embd"], OrderedDict()
    out["transformer.wte.weight"] = torch.randn(args["vocab_size"], c) * 0.2
    out["transformer.wpe.weight"] = torch.randn(args["block_size"], c) * 0.2
    for i in range(args["n_layer"]):
        for name, shape in (
            ("ln_1", (c,)),
            ("attn.c_attn", (3 * c, c)),
            ("attn.c_proj", (c, c)),
            ("ln_2", (c,)),
            ("mlp.c_fc", (4 * c, c)),
            ("mlp.c_proj", (c, 4 * c)),
        ):
            out[f"transformer.h.{i}.{name}.weight"] = torch.randn(shape) * 0.2 + (len(shape) == 1)
            if args["bias"]:
                out[f"transformer.h.{i}.{name}.bias"] = torch.randn(shape[0]) * 0.2
    out["transformer.ln_f.weight"] = torch.randn(c) * 0.2 + 1
    if args["bias"]:
        out["transformer.ln_f.bias"] = torch.randn(c) * 0.2
    out["lm_head.weight"] = out["transformer.wte.weight"]
    return out


def nanogpt_logits(w: dict[str, Tensor], args: dict[str, Any], tokens: Tensor) -> Tensor:
    """nanoGPT's forward pass, head by head, from the names in its file."""
    c, n_head = args["n_embd"], args["n_head"]
    d, t = c // n_head, tokens.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:t]
    past = torch.ones(t, t).tril().bool()
    for i in range(args["n_layer"]):
        at = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").split(c, dim=2)
        heads = []
        for h in range(n_head):
            one = slice(h * d, (h + 1) * d)
            scores = (q[..., one] @ k[..., one].mT / d**0.5).masked_fill(~past, -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., one])
        x = x + linear(torch.cat(heads, -1), f"{at}.attn.c_proj")
        hidden = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def checkpoint(model: Any, args: Any) -> dict[str, Any]:
    """What nanoGPT saves, with AdamW's state for one of the parameters."""
    adam = {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "params": [0]}]
    more = {"iter_num": 7, "best_val_loss": torch.tensor(3.2), "config": {"out_dir": "out", "compile": True}}
    return {"model": model, "model_args": args, "optimizer": {"state": {0: adam}, "param_groups": groups}, **more}


def save(folder: Path, model: Any = None, args: Any = None, **how: Any) -> Path:
    folder.mkdir()
    torch.save(checkpoint(nanogpt_weights(ARGS) if model is None else model, args or ARGS), folder / "ckpt.pt", **how)
    return folder / "ckpt.pt"


def imported_logits(source: Path, out: Path, tokens: Tensor, **given: Any) -> Tensor:
    import_hf(ImportHfConfig(str(source), str(out), **given))
    (logits,) = our_logits(out, model_of(out, RunFolder.state(out)), [tokens])
    return logits


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_nanogpt(
    bias: bool, wrapper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the file, or from the folder that holds it; a torch.compile or DistributedDataParallel around it or not."""
    seed, args = torch.seed(), {**ARGS, "bias": bias}
    weights = nanogpt_weights(args)
    source = save(tmp_path / "out-x", {wrapper + name: x for name, x in weights.items()}, args)
    tokens = torch.randint(ARGS["vocab_size"], (3, ARGS["block_size"]))
    theirs = nanogpt_logits(weights, args, tokens)
    ours = imported_logits(source if bias else source.parent, tmp_path / "a", tokens)
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= 1e-5 * scale and scale > 1, f"max|a-b| = {error:.3g} against max|b| = {scale:.3g}, {seed=}"
    said = capsys.readouterr().out
    assert "from nanoGPT's ckpt.pt" in said and "the weights of its step 7 alone" in said
    assert ("biases of zero" in said) is not bias and "no tokenizer.json" in said and "give tokenizer=" in said


def test_slow_attentions_masks_and_half_weights_are_read(tmp_path: Path) -> None:
    weights = {name: x.bfloat16() for name, x in nanogpt_weights(ARGS).items()}
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    tokens = torch.randint(ARGS["vocab_size"], (2, 24))
    theirs = nanogpt_logits({name: x.float() for name, x in weights.items()}, ARGS, tokens)
    ours = imported_logits(save(tmp_path / "x", {**weights, **masks}), tmp_path / "a", tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_vocabulary_comes_from_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is kept in the checkpoint; one with more tokens than the model is refused."""
    few = train_bpe(["the cat sat on the mat, and the dog ate the rat that sat there"] * 9, 280)
    few.save(tmp_path)
    source = save(tmp_path / "x")
    import_hf(ImportHfConfig(str(source), str(tmp_path / "a"), str(tmp_path)))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == few.raw
    assert "tokenizer.json has 280 tokens, the model has rows for 320" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tokenizer=gpt2 has 50257 tokens, the model of source=.* vocab_size=320"):
        import_hf(ImportHfConfig(str(source), str(tmp_path / "b"), "gpt2"))
    assert not (tmp_path / "b").exists()


class Call:
    """Pickled as a call of `what` with `args`, which opening the pickle would make."""

    def __init__(self, what: Callable[..., Any], *args: Any) -> None:
        self.call = what, args

    def __reduce__(self) -> Any:
        return self.call


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(change(path.read_bytes())), None)[1]


def _body(**values: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(checkpoint(nanogpt_weights(ARGS), ARGS) | values, path)


def _model(**tensors: Any) -> Callable[[Path], None]:
    named = {f"transformer.{name.replace('__', '.')}": x for name, x in tensors.items()}
    return _body(model={n: x for n, x in (nanogpt_weights(ARGS) | named).items() if x is not None})


def _args(**values: Any) -> Callable[[Path], None]:
    return _body(model_args=ARGS | values)


def _protocol_4(path: Path) -> None:
    torch.save(checkpoint(nanogpt_weights(ARGS), ARGS), path, pickle_protocol=4)


def _compressed(body: bytes) -> bytes:
    """The list of entries says that the pickle is compressed."""
    at = body.rindex(b"PK\1\2", 0, body.rindex(b"/data.pkl"))
    return body[: at + 10] + b"\x08" + body[at + 11 :]


def _growing(path: Path) -> None:
    """A tensor that claims 40 GB of a storage of one number."""
    storage = torch.storage.TypedStorage(1, dtype=torch.float)
    big = Call(torch._utils._rebuild_tensor_v2, storage, 0, (10**10,), (1,), False, OrderedDict())
    torch.save(checkpoint(nanogpt_weights(ARGS), ARGS) | {"x": big}, path)


ONE = torch.ones(99_999)
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a command": (_body(config=Call(os.mkdir, "it-ran")), "its pickle asks for posix.mkdir, and may run any program"),
    "a lot of memory": (_body(config=Call(bytearray, 10**12)), "its pickle asks for __builtin__.bytearray"),
    "a big tensor": (_body(config=Call(torch.Tensor, 10**12)), "its pickle asks for torch.Tensor"),
    "names on the stack": (_protocol_4, "its pickle asks for STACK_GLOBAL"),
    "numbers of numpy": (_body(best_val_loss=np.float64(3)), "its pickle asks for numpy."),
    "a storage that grows": (_growing, "damaged (Trying to resize storage that is not resizable)"),
    "a tensor of one number": (
        _model(wte__weight=torch.zeros(1).expand(10**9, 32)),
        "wte.weight is larger than its bytes",
    ),
    "one tensor many times": (_model(**dict.fromkeys("abcdefghi", ONE)), "its tensors are larger than the file"),
    "cut at the end": (_bytes(lambda body: body[:-1]), "its end is missing"),
    "half": (_bytes(lambda body: body[: len(body) // 2]), "its end is missing"),
    "a byte more": (_bytes(lambda body: body + b"\0"), "its end is missing"),
    "a byte more at the start": (_bytes(lambda body: body[:4] + b"\0" + body[4:]), "not at its end"),
    "compressed": (_bytes(_compressed), "an entry is compressed"),
    "no pickle": (_bytes(lambda body: body.replace(b"/data.pkl", b"/dato.pkl")), "no data.pkl"),
    "no zip": (_bytes(lambda body: b"\x80\x02" + body), "neither a zip as nanoGPT's nor llm.c's first number"),
    "empty": (_bytes(lambda body: b""), "neither a zip"),
    "another dict": (lambda path: torch.save({"a": torch.ones(3)}, path), "holds no `model` and `model_args`"),
    "a tensor alone": (lambda path: torch.save(torch.ones(3), path), "holds no `model` and `model_args`"),
    "another setting": (_args(rotary=True), "rotary is no setting of nanoGPT's own model"),
    "no bias setting": (_args(bias=None), "bias=null: give true or false"),
    "huge": (_args(n_embd=10**30), "n_embd=1000000000000000000000000000000: give a whole number"),
    "huge within bounds": (_args(n_embd=98304, n_head=1), "wte.weight is [320, 32] in"),
    "many layers": (_args(n_layer=1000, bias=True), "has no h.2.ln_1.weight"),
    "a size of another type": (_args(n_head=True), "n_head=true: give a whole number"),
    "a tensor as a size": (_args(n_head=torch.tensor(4)), "n_head=tensor(4): give a whole number"),
    "heads that do not divide": (_args(n_head=5), "model.n_embd=32 is not a multiple of model.n_head=5"),
    "a bias too much": (_args(bias=False), "bias=false, but h.0.attn.c_attn.bias is there"),
    "a missing tensor": (_model(h__1__ln_2__bias=None), "has no h.1.ln_2.bias"),
    "an extra tensor": (_model(x=torch.ones(3)), "has x, which model=x does not have"),
    "a wrong shape": (_model(ln_f__bias=torch.ones(33)), "ln_f.bias is [33] in"),
    "a wrong type": (_model(ln_f__bias=torch.ones(32, dtype=torch.float64)), "ln_f.bias is torch.float64: save it"),
    "not finite": (_model(ln_f__bias=torch.full((32,), torch.inf)), "ln_f.bias holds values that are not finite"),
    "no tensor": (_model(ln_f__bias=[1.0] * 32), "ln_f.bias of `model` is no tensor"),
    "twice": (_body(model=nanogpt_weights(ARGS) | {"wpe.weight": torch.ones(24, 32)}), "wpe.weight is there twice"),
    "an untied head": (
        _body(model=nanogpt_weights(ARGS) | {"lm_head.weight": torch.ones(320, 32)}),
        "lm_head.weight is not the token embedding",
    ),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("what", HOSTILE)
def test_an_unusable_file_is_refused_and_runs_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line; nothing is left at `out`."""
    monkeypatch.chdir(tmp_path)
    change, line = HOSTILE[what]
    path = save(tmp_path / "x")
    change(path)
    with pytest.raises(UserError) as caught:
        import_hf(ImportHfConfig(str(path), str(tmp_path / "out")))
    message = str(caught.value)
    assert line in message and str(path) in message and "\n" not in message and len(message) < 500, message
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_any_damage_is_an_error_of_one_line_or_none(tmp_path: Path) -> None:
    """Bytes turned to others anywhere but in the tensors' own."""
    draw = random.Random(seeded())
    path = save(tmp_path / "x")
    whole = path.read_bytes()
    places = [i for i in (*range(whole.index(b"FB") + 4000), *range(len(whole) - 4000, len(whole))) if i < len(whole)]
    refused = 0
    for _ in range(300):
        body = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            body[draw.choice(places)] = draw.randrange(256)
        path.write_bytes(body)
        try:
            NanoGptFile(path).weights()
        except UserError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 100


def test_a_path_that_is_no_source_is_named(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            import_hf(ImportHfConfig(str(path), str(tmp_path / "out")))
        return str(caught.value)

    assert "no such file or folder: give a folder with Hugging Face's config.json" in refusal(tmp_path / "none")
    assert "holds no config.json" in refusal(tmp_path)
    source = save(tmp_path / "x")
    (source.parent / "config.json").write_text("{}")
    assert f"holds config.json and ckpt.pt: give source={source}" in refusal(source.parent)
    os.mkfifo(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and "not a regular file" in refusal(tmp_path / "pipe")


def test_torchs_oldest_form_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="neither a zip as nanoGPT's"):
        import_hf(ImportHfConfig(str(source), str(tmp_path / "out")))


def test_the_forward_pass_here_has_another_gelu_than_gpt2() -> None:
    """So a checkpoint that took GELU's tanh form would be found."""
    x = torch.linspace(-3, 3, 99)
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-4
