"""Opens what torch.save wrote: a zip of one pickle and the bytes of each tensor. Nothing in it runs.

Before torch reads it, two things are checked: the zip is as torch writes it, with nothing compressed, so nothing in it
grows; and the pickle asks for tensors alone. torch's own list for weights_only=True is longer: `bytearray` and
`torch.Tensor` are on it, which take a size, and with it any memory.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from conf.errors import UserError, of_nature
from data_pipeline.files import open_regular

CURE = "give a file that torch.save wrote"
KINDS = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in KINDS),
}
OTHER_CALLS = {
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "STACK_GLOBAL",
    "EXT1",
    "EXT2",
    "EXT4",
}  # torch writes none of these
PICKLE_BYTES = 4 << 20  # GPT-2 XL's with its optimizer has 0.3 MB
LIST_BYTES = 4 << 20  # of the zip's list of entries; GPT-2 XL's has 0.3 MB


def load(path: Path) -> Any:
    """The object of a file: dicts, lists, numbers and texts, and tensors that stay in the file until they are used.

    Raises:
        UserError: not torch.save's zip, damaged, or its pickle asks for anything but tensors.
    """
    try:
        with open_regular(path, CURE) as f:
            _check_pickle(path, _read_pickle(path, f))
    except OSError as e:
        raise of_nature(e, f"{path}: {(e.strerror or str(e)).lower()}: {CURE}") from None
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # the file decides which
        raise of_nature(e, f"{path}: damaged ({_line(e)}): download it again") from None


def _read_pickle(path: Path, f: BinaryIO) -> bytes:
    """The pickle's bytes, after its zip is checked."""
    size = f.seek(0, 2)
    f.seek(max(0, size - 98))
    end = f.read()
    if not (end[:4] == b"PK\6\6" and end[56:60] == b"PK\6\7" and end[76:80] == b"PK\5\6"):
        raise UserError(f"{path}: no zip of torch.save, or its end is missing: download it again, or {CURE}")
    length, start = (int.from_bytes(end[i : i + 8], "little") for i in (40, 48))
    if int.from_bytes(end[64:72], "little") != size - 98 or start + length != size - 98 or length > LIST_BYTES:
        raise UserError(f"{path}: damaged: its list of entries is not at its end: download it again")
    try:
        with zipfile.ZipFile(f) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
                raise UserError(f"{path}: an entry is compressed, which torch.save never does: {CURE}")
            pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES or sum(e.file_size for e in entries) > size:
                raise UserError(f"{path}: damaged: no data.pkl, or entries larger than the file: download it again")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as e:
        raise UserError(f"{path}: damaged ({_line(e)}): download it again") from None


def _check_pickle(path: Path, body: bytes) -> None:
    """Check all that a pickle would call, without calling it."""
    try:
        for op, arg, _ in pickletools.genops(body):
            if (op.name == "GLOBAL" and arg not in ALLOWED) or op.name in OTHER_CALLS:
                what = str(arg).replace(" ", ".") if arg else op.name
                raise UserError(
                    f"{path}: its pickle asks for {_line(what)}, and may run any program; nothing of it was run: "
                    "save tensors, numbers and texts alone"
                )
    except (ValueError, KeyError, IndexError, OverflowError) as e:
        raise UserError(f"{path}: damaged ({_line(e)}): download it again") from None


def _line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
