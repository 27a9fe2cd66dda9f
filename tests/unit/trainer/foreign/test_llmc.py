"""llm.c's .bin: its logits by a forward pass from the file's flat numbers, and files that are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from tests.helpers.seeds import seeded
from trainer.checkpoint.find import model_of
from trainer.config.hf import ImportHfConfig
from trainer.export_hf import our_logits
from trainer.import_hf import import_hf
from trainer.run.folder import RunFolder

SIZE = {"T": 24, "V": 300, "L": 3, "H": 4, "C": 32, "Vp": 384}
ORDER = {  # llm.c's ParameterTensors, gpt2_write_to_checkpoint
    "wte": "Vp C",
    "wpe": "T C",
    "ln1w": "L C",
    "ln1b": "L C",
    "qkvw": "L 3C C",
    "qkvb": "L 3C",
    "attprojw": "L C C",
    "attprojb": "L C",
    "ln2w": "L C",
    "ln2b": "L C",
    "fcw": "L 4C C",
    "fcb": "L 4C",
    "fcprojw": "L C 4C",
    "fcprojb": "L C",
    "lnfw": "C",
    "lnfb": "C",
}


def shape_of(name: str, size: dict[str, int] = SIZE) -> tuple[int, ...]:
    return tuple(size[d] if d in size else int(d[0]) * size["C"] for d in ORDER[name].split())


def write(path: Path, version: int, draw: np.random.Generator) -> Path:
    """Random weights with gains and biases that show; rows of padding that would be the likeliest."""
    out = [struct.pack("<256i", 20240326, version, *SIZE.values(), *[0] * 248)]
    for name in ORDER:
        x = draw.standard_normal(shape_of(name)).astype("f4") * np.float32(0.2) + np.float32(
            name in ("ln1w", "ln2w", "lnfw")
        )
        if name == "wte":
            x[SIZE["V"] :] = 9
        bits = np.ascontiguousarray(x, "<f4").view("<u4")
        out.append(x.astype("<f4").tobytes() if version == 3 else (bits >> 16).astype("<u2").tobytes())  # cut to bf16
    path.write_bytes(b"".join(out))
    return path


def llmc_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """llm.c's forward pass in fp64, position by position, from the flat file; [B, T, V]."""
    raw = path.read_bytes()
    magic, version, *size = struct.unpack("<8i", raw[:32])
    assert magic == 20240326
    s = dict(zip(("T", "V", "L", "H", "C", "Vp"), size, strict=True))
    flat = np.frombuffer(raw[1024:], "<f4" if version == 3 else "<u2")
    flat = flat if version == 3 else (flat.astype("<u4") << 16).view("<f4")
    w, at = {}, 0
    for name in ORDER:
        n = int(np.prod(shape_of(name, s)))
        w[name] = flat[at : at + n].reshape(shape_of(name, s)).astype("f8")
        at += n
    assert at == len(flat)

    def norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias

    d = s["C"] // s["H"]
    x = w["wte"][tokens] + w["wpe"][: tokens.shape[1]]
    for layer in range(s["L"]):
        qkv = norm(x, w["ln1w"][layer], w["ln1b"][layer]) @ w["qkvw"][layer].T + w["qkvb"][layer]
        q, k, v = (part.reshape(*x.shape[:2], s["H"], d) for part in np.split(qkv, 3, -1))
        seen = np.zeros_like(v)
        for t in range(x.shape[1]):
            scores = np.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / np.sqrt(d)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            seen[:, t] = np.einsum("bhs,bshd->bhd", weights / weights.sum(-1, keepdims=True), v[:, : t + 1])
        x = x + seen.reshape(x.shape) @ w["attprojw"][layer].T + w["attprojb"][layer]
        h = norm(x, w["ln2w"][layer], w["ln2b"][layer]) @ w["fcw"][layer].T + w["fcb"][layer]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w["fcprojw"][layer].T + w["fcprojb"][layer]
    return norm(x, w["lnfw"], w["lnfb"]) @ w["wte"][: s["V"]].T


@pytest.mark.parametrize("version", [3, 5])
def test_logits_are_those_of_llmc(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(seeded())
    path = write(tmp_path / "gpt2_tiny.bin", version, draw)
    tokens = draw.integers(0, SIZE["V"], (3, SIZE["T"]))
    import_hf(ImportHfConfig(str(path), str(tmp_path / "a")))
    cfg = model_of(tmp_path / "a", RunFolder.state(tmp_path / "a"))
    (ours,) = our_logits(tmp_path / "a", cfg, [torch.tensor(tokens)])
    theirs = torch.tensor(llmc_logits(path, tokens))
    error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= 1e-5 * scale and scale > 1, f"max|a-b| = {error:.3g} against max|b| = {scale:.3g}"
    said = capsys.readouterr().out
    assert "a: gpt2_tiny, " in said and "from llm.c's .bin" in said and "84 rows of padding" in said
    assert ("numbers of bfloat16 are converted" in said) == (version == 5)


def _header(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda body: body[: 4 * place] + struct.pack("<i", value) + body[4 * place + 4 :]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "llm.c's vocabulary": (_header(0, 20240328), "neither a zip as nanoGPT's nor llm.c's first number"),
    "an older version": (_header(1, 1), "version 1 of llm.c's file: 3 (fp32) and 5 (bf16) are read"),
    "bf16 that is fp32": (_header(1, 5), "damaged or cut"),
    "no layer": (_header(4, 0), "num_layers=0: give a whole number from 1 to 1,000"),
    "negative": (_header(6, -32), "channels=-32: give a whole number"),
    "huge": (_header(6, 2**31 - 1), "channels=2147483647: give a whole number from 1 to 100,000"),
    "huge within bounds": (_header(4, 1000), "its header says"),
    "a wide embedding": (_header(6, 99_996), "its header says"),
    "a long context": (_header(2, 10**6), "its header says"),
    "heads that do not divide": (_header(5, 5), "model.n_embd=32 is not a multiple of model.n_head=5"),
    "more tokens than rows": (_header(3, 385), "vocab_size=385: give a whole number from 1 to 384"),
    "a byte less": (lambda body: body[:-1], "damaged or cut"),
    "a byte more": (lambda body: body + b"\0", "damaged or cut"),
    "the header alone": (lambda body: body[:1024], "damaged or cut"),
    "half a header": (lambda body: body[:512], "512 bytes, less than llm.c's header of 1024"),
    "not finite": (lambda body: body[:-4] + struct.pack("<f", np.nan), "ln_f.bias holds values that are not finite"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_unusable_file_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    """Nothing is left at `out`."""
    change, line = HOSTILE[what]
    path = write(tmp_path / "x.bin", 3, np.random.default_rng(1))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        import_hf(ImportHfConfig(str(path), str(tmp_path / "out")))
    message = str(caught.value)
    assert line in message and str(path) in message and "\n" not in message and len(message) < 500, message
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
