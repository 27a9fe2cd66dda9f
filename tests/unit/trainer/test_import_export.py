"""Hugging Face's folders in and out, in the test's own process: bits, logits, and what is refused before any work."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import Tokenizer, train_bpe
from tests.helpers.hf_models import SIZE, hf_model, save
from tests.helpers.ranks import ROOT
from trainer.checkpoint.files import SavedWeights
from trainer.checkpoint.find import check_model, model_of
from trainer.config.hf import ExportHfConfig, ImportHfConfig
from trainer.config.model import Gelu, Norm
from trainer.export_hf import compare, export_hf, our_logits
from trainer.hf.settings import hf_refusal
from trainer.import_hf import import_hf
from trainer.run.folder import RunFolder

NORMS = pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
QKV = "transformer.h.1.attn.c_attn.weight"


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return train_bpe(list(pydoc_data.topics.topics.values())[:15], SIZE["vocab_size"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(hf_model(Norm.pre), tmp_path / "gpt2")


def imported(source: Path, out: Path) -> dict[str, Tensor]:
    import_hf(ImportHfConfig(str(source), str(out)))
    return dict(SavedWeights(out))


def logits_of(checkpoint: Path, tokens: Tensor) -> Tensor:
    (out,) = our_logits(checkpoint, model_of(checkpoint, RunFolder.state(checkpoint)), [tokens])
    return out


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= 1e-5 * scale, f"{what}: max|a-b| = {error:.3g} against max|b| = {scale:.3g}"


@NORMS
def test_a_model_goes_in_and_out_bit_for_bit_with_its_vocabulary(
    norm: Norm, tmp_path: Path, vocabulary: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = torch.seed()
    model = hf_model(norm, layer_norm_epsilon=1e-3)  # not the default, and big enough to show
    save(model, tmp_path / "theirs")
    vocabulary.save(tmp_path / "theirs")
    first = imported(tmp_path / "theirs", tmp_path / "a")
    tokens = torch.randint(SIZE["vocab_size"], (3, SIZE["n_positions"]))
    with torch.no_grad():
        assert_close(logits_of(tmp_path / "a", tokens), model(tokens).logits, f"logits, seed={seed}")

    export_hf(ExportHfConfig(str(tmp_path / "a"), str(tmp_path / "ours")))
    assert "AutoTokenizer gives the same tokens" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before), f"seed={seed}"
    cfg = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config
    assert (cfg.eos_token_id, cfg.layer_norm_epsilon) == (vocabulary.eot_id, 1e-3)

    again = imported(tmp_path / "ours", tmp_path / "b")
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first), f"seed={seed}"
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == vocabulary.raw
    assert not list(tmp_path.glob(".*"))


def test_gelu_by_the_error_function_goes_in_and_out(tmp_path: Path) -> None:
    seed = torch.seed()
    model = hf_model(Norm.pre, activation_function="gelu")
    imported(save(model, tmp_path / "theirs"), tmp_path / "a")
    cfg = model_of(tmp_path / "a", RunFolder.state(tmp_path / "a"))
    tokens = torch.randint(SIZE["vocab_size"], (3, SIZE["n_positions"]))
    other = hf_model(Norm.pre)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact, tanh = model(tokens).logits, other(tokens).logits
    assert (exact - tanh).abs().max() > 5e-5 * exact.abs().max(), f"the two forms are as one, seed={seed}"
    assert_close(logits_of(tmp_path / "a", tokens), exact, f"logits, seed={seed}")
    with pytest.raises(UserError, match=r"another model: model\.gelu=exact \(here tanh\)"):
        check_model(tmp_path / "a", cfg, replace(cfg, gelu=Gelu.tanh))

    export_hf(ExportHfConfig(str(tmp_path / "a"), str(tmp_path / "ours")))  # it compares logits
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.activation_function == "gelu"
    assert "OpenAI GPT has GELU's tanh form only" in str(hf_refusal(replace(cfg, norm=Norm.post)))


def test_checkpoints_of_before_have_gelus_tanh_form(tmp_path: Path, folder: Path) -> None:
    imported(folder, tmp_path / "a")
    state = RunFolder.state(tmp_path / "a")
    assert state["model"].pop("gelu") == "tanh" and model_of(tmp_path / "a", state).gelu is Gelu.tanh
    state["model"]["gelu"] = "relu"
    with pytest.raises(UserError, match="damaged: no model"):
        model_of(tmp_path / "a", state)


def test_an_export_that_is_not_the_checkpoint_is_found(tmp_path: Path, folder: Path) -> None:
    """By its logits."""
    imported(folder, tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][3] += 1e-2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = model_of(tmp_path / "a", RunFolder.state(tmp_path / "a"))
    with pytest.raises(UserError, match=r"transformers' logits differ by .* more than 1e-05"):
        compare(folder, tmp_path / "a", model, None)


@pytest.mark.parametrize("how", ["parts", "no prefix and masks", "half", "head"])
def test_every_way_in_which_a_folder_keeps_its_weights_is_read(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = torch.seed()
    model = hf_model(Norm.pre)
    folder = save(model, tmp_path / "x", **({"max_shard_size": "200KB"} if how == "parts" else {}))
    if how == "parts":
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    else:
        state = load_file(folder / "model.safetensors")
        if how == "half":
            state = {n: x.to(torch.bfloat16 if "mlp" in n else torch.float16) for n, x in state.items()}
            model.load_state_dict(state, strict=False)
        elif how == "head":
            state["lm_head.weight"] = state["transformer.wte.weight"].clone()
        else:  # as the first files of GPT-2 were
            state = {n.removeprefix("transformer."): x for n, x in state.items()}
            state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril().to(torch.uint8) for i in range(2)}
            state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        save_file(state, folder / "model.safetensors")
    imported(folder, tmp_path / "a")
    tokens = torch.randint(SIZE["vocab_size"], (2, SIZE["n_positions"]))
    with torch.no_grad():
        assert_close(logits_of(tmp_path / "a", tokens), model(tokens).logits, f"{how}, seed={seed}")
    said = capsys.readouterr().out
    assert ("tensors of bfloat16 are converted to float32" in said) == (how == "half")


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(body | values))

    return change


def weights(**values: Tensor | None) -> Callable[[Path], None]:
    """Tensors put in place, or taken away."""

    def change(folder: Path) -> None:
        state: dict[str, Any] = load_file(folder / "model.safetensors")
        names = {name.replace("__", "."): x for name, x in values.items()}
        state = {n: x for n, x in (state | names).items() if x is not None}
        save_file(state, folder / "model.safetensors")

    return change


def header(length: int | None = None, **tensor: Any) -> Callable[[Path], None]:
    """A header that claims a length, or a tensor of a size that is not there."""

    def change(folder: Path) -> None:
        text = json.dumps({"transformer.wte.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | tensor})
        body = text.encode() + b"\0" * 4
        size = len(text) if length is None else length
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + body)

    return change


def parts(**weight_map: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        names = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
        names |= {name.replace("__", "."): file for name, file in weight_map.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sparse(folder: Path) -> None:
    """A terabyte of zeros, all of it in a header that is true: more than config.json says."""
    text = json.dumps({"transformer.wte.weight": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text.encode())
        f.truncate(8 + len(text) + 2**40)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{" * 9), "config.json: not JSON"),
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 99999), "config.json: not JSON"),
    "another kind": (config(model_type="llama"), "model_type=llama: give a model of type gpt2 or openai-gpt"),
    "huge": (config(n_embd=10**30, n_head=1), "n_embd=1000000000000000000000000000000: give a whole number"),
    "huge within bounds": (config(n_embd=98304, n_head=1), "wte.weight is [1000, 64] in the Hugging Face state"),
    "negative": (config(n_layer=-1), "n_layer=-1: give a whole number from 1"),
    "no size": (config(n_head=None), "n_head=null"),
    "a size of another type": (config(n_head=True), "n_head=true"),
    "heads that do not divide": (config(n_head=7), "model.n_embd=64 is not a multiple of model.n_head=7"),
    "another activation": (config(activation_function="relu"), "activation_function=relu: our gpt2 has"),
    "a wider MLP": (config(n_inner=300), "n_inner=300: our MLP is 4 x n_embd=256 wide"),
    "scaled by layer": (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=true"),
    "not scaled": (config(scale_attn_weights=False), "scale_attn_weights=false"),
    "upcast": (config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=true"),
    "cross attention": (config(add_cross_attention=True), "add_cross_attention=true"),
    "an untied head": (config(tie_word_embeddings=False), "tie_word_embeddings=false"),
    "heads cut out": (config(pruned_heads={"0": [1]}), "pruned_heads={'0': [1]}"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
    "dropouts that differ": (config(attn_pdrop=0.3), "embd_pdrop=0.0, attn_pdrop=0.3, resid_pdrop=0.0"),
    "no number": (config(layer_norm_epsilon=float("nan")), "layer_norm_epsilon=nan"),
    "two contexts": (config(n_ctx=32), "n_ctx=32 is not n_positions=64"),
    "a pickle": (pickled, "pytorch_model.bin is a pickle, which may run any program"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "a header of 0 bytes"),
    "a header of exabytes": (header(2**62), f"a header of {2**62} bytes"),
    "a header past the end": (header(9999), "a header of 9999 bytes"),
    "a tensor past the end": (header(shape=[2**40], data_offsets=[0, 2**42]), "not a safetensors file"),
    "a shape that overflows": (header(shape=[2**40, 2**40]), "not a safetensors file"),
    "more than it says": (sparse, "more than the 168,192 parameters of config.json can take"),
    "more elements than it says": (weights(y=torch.ones(999999)), "it has more than the 168,192 parameters"),
    "a missing tensor": (weights(**{QKV.replace(".", "__"): None}), "has no h.1.attn.c_attn.weight"),
    "an extra tensor": (weights(transformer__x=torch.ones(3)), "has x, which model=gpt2 does not have"),
    "a wrong shape": (weights(**{QKV.replace(".", "__"): torch.ones(192, 64)}), "c_attn.weight is [192, 64]"),
    "a wrong type": (weights(transformer__ln_f__bias=torch.ones(64, dtype=torch.int8)), "ln_f.bias is I8"),
    "not finite": (weights(transformer__ln_f__bias=torch.full((64,), torch.nan)), "ln_f.bias holds values that are"),
    "twice": (weights(ln_f__bias=torch.ones(64)), "ln_f.bias is there twice"),
    "a path": (parts(transformer__ln_f__bias="../one.safetensors"), "../one.safetensors is not the name"),
    "an absolute path": (parts(transformer__ln_f__bias="/etc/x.safetensors"), "/etc/x.safetensors is not the name"),
    "a part that is not there": (parts(transformer__ln_f__bias="two.safetensors"), "two.safetensors: no such file"),
    "an index that lies": (parts(transformer__z="one.safetensors"), "has transformer.z, not both"),
    "no vocabulary": (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json: not a tokenizer"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_unusable_source_is_refused_in_one_line(what: str, tmp_path: Path, folder: Path) -> None:
    """Nothing is left at `out`."""
    change, line = HOSTILE[what]
    change(folder)
    with pytest.raises(UserError) as caught:
        import_hf(ImportHfConfig(str(folder), str(tmp_path / "out")))
    message = str(caught.value)
    assert line in message and str(folder) in message and "\n" not in message and len(message) < 500, message
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]


def test_openai_gpts_settings_are_checked_by_its_own_names(tmp_path: Path) -> None:
    folder = save(hf_model(Norm.post), tmp_path / "gpt1")
    config(afn="silu")(folder)
    with pytest.raises(UserError, match="afn=silu: our openai-gpt has afn=gelu only"):
        import_hf(ImportHfConfig(str(folder), str(tmp_path / "out")))


def test_keys_that_are_not_known_are_named(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(my_scale=3)(folder)
    imported(folder, tmp_path / "a")
    assert "keys of its config.json that are not used: my_scale\n" in capsys.readouterr().out


def test_what_is_there_is_never_written_over(tmp_path: Path, folder: Path) -> None:
    imported(folder, tmp_path / "a")
    for call in (
        lambda: import_hf(ImportHfConfig(str(folder), str(tmp_path / "a"))),
        lambda: export_hf(ExportHfConfig(str(tmp_path / "a"), str(folder))),
    ):
        with pytest.raises(UserError, match="exists: give another folder"):
            call()
    (tmp_path / ".b.tmp").mkdir()
    with pytest.raises(UserError, match=r"\.b\.tmp exists: another command is writing"):
        import_hf(ImportHfConfig(str(folder), str(tmp_path / "b")))


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, folder: Path) -> None:
    imported(folder, tmp_path / "a")
    file = tmp_path / "a" / "weights-00000.safetensors"
    body = bytearray(file.read_bytes())
    body[-9] ^= 1
    file.write_bytes(body)
    with pytest.raises(UserError, match=r"weights-00000\.safetensors: its sha256 is not the manifest's"):
        export_hf(ExportHfConfig(str(tmp_path / "a"), str(tmp_path / "out")))
    assert {p.name for p in tmp_path.iterdir()} == {"gpt2", "a"}


def test_the_command_ends_with_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    pickled(folder)
    argv = [sys.executable, "-m", "trainer.import_hf", f"source={folder}", f"out={tmp_path / 'out'}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
