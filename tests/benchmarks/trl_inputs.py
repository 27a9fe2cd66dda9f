"""The examples and the first weights of tests/benchmarks/trl.py, the same for both sides."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

QUIET = ("precision=fp32", "tracking=none", "model.dropout=0", "watch.hang_min_s=600")  # settings of each run of ours


def records(kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Conversations, or comparisons of two answers, of the words of Python's own manual."""
    from pydoc_data.topics import topics

    draw, words = Random(seed), " ".join(topics.values()).split()

    def text(low: int, high: int) -> list[str]:
        start = draw.randrange(len(words) - high)
        return words[start : start + draw.randint(low, high)]

    found: list[dict[str, Any]] = []
    for number in range(n):
        asked, answer = f"{number}: {' '.join(text(2, 6))}"[:60], text(4, 14)
        if kind == "sft":
            turns = (("user", asked), ("assistant", " ".join(answer)[:120]))
            found.append({"messages": [{"role": role, "content": content} for role, content in turns]})
        else:
            other = draw.sample(answer, draw.randint(3, len(answer)))
            found.append({"prompt": asked, "chosen": " ".join(answer)[:120], "rejected": " ".join(other)[:120]})
    return found


def model_words(given: dict[str, Any], vocab_size: int) -> list[str]:
    shape = {"n_layer": given["layers"], "n_head": 4, "n_embd": given["width"], "n_ctx": given["n_ctx"]}
    return ["model=test", *(f"model.{k}={v}" for k, v in (shape | {"vocab_size": vocab_size}).items())]


def make_model(root: Path, given: dict[str, Any]) -> list[str]:
    """A checkpoint `base` of a folder of Hugging Face's, and the folder `hf` that is exported from it.

    The vocabulary is the 256 bytes and the special tokens. Returns the settings of the model.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    from conf.schema import load
    from data_pipeline.examples.examples_config import Template
    from data_pipeline.examples.templates import Renderer
    from data_pipeline.tokenizer.tokenizer import Tokenizer
    from data_pipeline.tokenizer.vocabularies import EOT, byte_level
    from trainer.checkpoint.files import write_safetensors
    from trainer.config.hf import ExportHfConfig, ImportHfConfig
    from trainer.config.tuning.sft import SftConfig
    from trainer.distributed.mesh import single_rank_mesh
    from trainer.distributed.world import read_world
    from trainer.export_hf import export_hf
    from trainer.hf.weights import hf_config, to_hf
    from trainer.import_hf import import_hf
    from trainer.model.gpt import GPT
    from trainer.model.init import initialise

    plain = Tokenizer(byte_level({x: i for i, x in enumerate(sorted(ByteLevel.alphabet()))} | {EOT: 256}, []))
    tokenizer = plain.with_special(Renderer(Template.roles, plain).special)
    words = model_words(given, tokenizer.vocab_size)
    cfg = load(SftConfig, [*words, *QUIET, "init_from=none", "examples.path=none"]).model
    model = GPT(cfg, single_rank_mesh(read_world()))
    initialise(model, cfg, given["seed"])
    state = {n: x[: cfg.vocab_size] if n == "wte.weight" else x for n, x in model.state_dict().items()}
    source = root / "source"
    source.mkdir()
    write_safetensors(source / "model.safetensors", to_hf(state, cfg))
    (source / "config.json").write_text(json.dumps(hf_config(cfg, tokenizer.eot_id)))
    tokenizer.save(source)
    import_hf(load(ImportHfConfig, [f"source={source}", f"out={root / 'base'}"]))
    export_hf(load(ExportHfConfig, [f"checkpoint={root / 'base'}", f"out={root / 'hf'}"]))
    return words
