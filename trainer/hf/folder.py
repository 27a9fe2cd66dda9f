"""Reads the weights of a transformers model with safetensors alone, and publishes new folders whole or not at all.

The files come from others: names and sizes are checked before they are used, and no pickle is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError, of_nature
from data_pipeline.files import fsync_folder, read_json
from data_pipeline.manifest import TOKENIZER
from trainer.hf.settings import MASKS, PREFIX, model_from_hf
from trainer.model.arithmetic import param_count

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
JSON_BYTES = 16 << 20  # a config or an index; a tokenizer may be four times as big
HEADER_BYTES = 16 << 20  # of a safetensors file; GPT-2 XL's has 60 KB
DTYPES = ("F32", "F16", "BF16")
LONG = {"F16": "float16", "BF16": "bfloat16"}


class HfFolder:
    """A model folder of transformers: `cfg` is its model, `tensors` reads its weights.

    Raises:
        UserError: the folder is missing, its model is not one of ours, or its weights are a pickle.
    """

    kind = "a folder of Hugging Face's"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise UserError(
                f"source={path} holds no {CONFIG}: give a folder with Hugging Face's {CONFIG} and {WEIGHTS}"
            )
        name = path.resolve().name or "imported"
        try:
            cfg, unused = model_from_hf(read_json(path / CONFIG, "download it again", JSON_BYTES), name)
        except UserError as e:
            raise UserError(str(e) if str(path) in str(e) else f"{path / CONFIG}: {e}") from None
        self.cfg = cfg
        self.unused = unused
        self.files = self._files()
        self.converted: dict[str, int] = {}  # dtype that is not fp32: tensors of it
        self._seen: set[str] = set()
        self._elements = 0
        self._max_elements = (
            param_count(self.cfg) + self.cfg.vocab_size * self.cfg.n_embd
        )  # the tied head may be there too

    def weights(self) -> dict[str, Tensor]:
        """Our parameters in fp32.

        Raises:
            UserError: a damaged file, or weights that are not those of the folder's model.
        """
        from trainer.hf.weights import from_hf

        try:
            return from_hf(self.tensors(), self.cfg)
        except UserError as e:
            raise UserError(str(e) if str(self.path) in str(e) else f"source={self.path}: {e}") from None

    def notes(self) -> list[str]:
        """Lines of what was converted or not used, once the weights are read."""
        lines = [
            f"{n} tensors of {LONG[dtype]} are converted to float32" for dtype, n in sorted(self.converted.items())
        ]
        return (
            [*lines, f"keys of its config.json that are not used: {', '.join(self.unused)}"] if self.unused else lines
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every weight in fp32, by its name in the files, without the constants of old files.

        Raises:
            UserError: a damaged file, too many numbers, a tensor of another type, or one that is not finite.
        """
        from safetensors import SafetensorError, safe_open

        from trainer.hf.weights import to_fp32

        out: dict[str, Tensor] = {}
        for file, named in self.files.items():
            self._check_size(file)
            try:
                with safe_open(self.path / file, framework="pt") as opened:
                    for name in self._wanted(file, opened, named):
                        out[name] = to_fp32(opened.get_tensor(name), f"{self.path / file}: {_short(name)}")
            except (SafetensorError, OSError, RuntimeError) as e:  # RuntimeError: it cannot be mapped
                message = f"{self.path / file}: not a safetensors file ({_short(e)}): download it again"
                raise of_nature(e, message) from None
        return out

    def _wanted(self, file: str, opened: Any, named: set[str] | None) -> list[str]:
        """The names of a file's weights, after its header is checked."""
        path = self.path / file
        names = set(opened.keys())
        if named is not None and names != named:
            raise UserError(f"{path}: it or {INDEX} has {_few(names ^ named)}, not both: download them again")
        wanted = sorted(name for name in names if not name.endswith(MASKS))
        for name in wanted:
            tensor = opened.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise UserError(
                    f"{path}: {_short(name)} is {tensor.get_dtype()}: save it as float32, float16 or bfloat16"
                )
            if tensor.get_dtype() != "F32":
                self.converted[tensor.get_dtype()] = self.converted.get(tensor.get_dtype(), 0) + 1
            bare = name.removeprefix(PREFIX)
            if bare in self._seen:
                raise UserError(f"{path}: {_short(bare)} is there twice, with and without the prefix {PREFIX!r}")
            self._seen.add(bare)
            self._elements += prod(tensor.get_shape())
        if self._elements > self._max_elements:
            raise UserError(f"{path}: it has more than the {param_count(self.cfg):,} parameters of {CONFIG}")
        return wanted

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer.json; None without one.

        Raises:
            UserError: it is damaged, or has more tokens than the model.
        """
        from data_pipeline.tokenizer.tokenizer import Tokenizer

        path = self.path / TOKENIZER
        if not path.is_file():
            return None
        if path.stat().st_size > 4 * JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than the {4 * JSON_BYTES:,} of a vocabulary")
        tokenizer = Tokenizer(path.read_bytes(), str(path))
        if tokenizer.vocab_size > self.cfg.vocab_size:
            raise UserError(
                f"{path} has {tokenizer.vocab_size} tokens, the model vocab_size={self.cfg.vocab_size}: "
                "put the model's own tokenizer.json there, or remove it"
            )
        return tokenizer

    def _files(self) -> dict[str, set[str] | None]:
        """Each file of weights with its names in the index; None without an index."""
        one, index = (self.path / WEIGHTS).is_file(), (self.path / INDEX).is_file()
        if one and index:
            raise UserError(f"source={self.path} holds {WEIGHTS} and {INDEX}: remove one of them")
        if one:
            return {WEIGHTS: None}
        if index:
            return dict(_shards(self.path))
        pickle = next((name for name in PICKLES if (self.path / name).is_file()), None)
        if pickle:
            raise UserError(
                f"{self.path / pickle} is a pickle, which may run any program when it is opened: if you trust it, "
                "save the model as safetensors with transformers' save_pretrained(DIR)"
            )
        raise UserError(f"source={self.path} holds neither {WEIGHTS} nor {INDEX}: save the model as safetensors")

    def _check_size(self, file: str) -> None:
        """Check the sizes of the file and of its header before anything maps or reads them."""
        path, cfg = self.path / file, self.cfg
        masks = cfg.n_layer * (cfg.n_ctx**2 + 1) + cfg.n_ctx
        if path.stat().st_size > 4 * (self._max_elements + masks) + HEADER_BYTES:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, more than the {param_count(cfg):,} parameters of "
                f"{CONFIG} can take: one of the two is of another model"
            )
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, path.stat().st_size - 8):
            raise UserError(f"{path}: not a safetensors file (a header of {length} bytes): download it again")


def _shards(path: Path) -> dict[str, set[str]]:
    weight_map = read_json(path / INDEX, "download it again", JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX}: no weight_map: download it again")
    out: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and not file.startswith(".")
        if not plain or not file.endswith(".safetensors"):
            raise UserError(f"{path / INDEX}: {_short(file)} is not the name of a safetensors file in this folder")
        if file not in out and not (path / file).is_file():
            raise UserError(f"{path / file}: no such file, but {INDEX} names it: fetch it")
        out.setdefault(file, set()).add(name)
    return out


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A new folder to fill: it becomes `out` at the end of the block, and is deleted after an error.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    final = Path(out)
    staging = final.with_name(f".{final.name}.tmp")
    if not final.name or final.exists() or final.is_symlink():
        raise UserError(f"out={out} exists: give another folder")
    try:
        staging.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{staging} exists: another command is writing out={out}; if that was killed, remove the folder"
        ) from None
    except OSError as e:
        raise of_nature(e, f"out={out}: {e.strerror}: give a folder that can be written") from None
    try:
        yield staging
        fsync_folder(staging)
        staging.rename(final)
        fsync_folder(final.parent)
    except BaseException as e:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(e, UserError) and isinstance(e.__context__, OSError):  # of write_file, which speaks of runs
            raise of_nature(e, f"out={out}: {e.__context__.strerror}: give a disk with room") from None
        raise


def _few(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(map(_short, shown)) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
