"""The settings of a Hugging Face config.json (GPT-2 or OpenAI GPT) as our model. Standard library only.

The file comes from others: each setting that changes what the model computes is checked, and sizes are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.errors import UserError
from trainer.config.model import Gelu, ModelConfig, Norm
from trainer.config.tracking import TrackingConfig

PREFIX = "transformer."  # of tensors' names
MASKS = (".attn.bias", ".attn.masked_bias", "position_ids")  # constants in old files
NORMS = {"gpt2": Norm.pre, "openai-gpt": Norm.post}
LIMITS = {"n_layer": 1000, "n_head": 1000, "n_embd": 100_000, "n_positions": 1_000_000, "vocab_size": 10_000_000}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
DEFAULTS = {**dict.fromkeys(DROPOUTS, 0.1), "layer_norm_epsilon": 1e-5, "initializer_range": 0.02}  # transformers' own
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {  # the values that we support; the first is that of a missing key
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),  # two names of the tanh form, the exact one
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    "openai-gpt": {"afn": ("gelu",)},  # the tanh form under its old name
}
ONLY_BOTH: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
UNUSED = {  # keys that change no logit: the author, sampling, heads for other tasks
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "n_special", "predict_special_tokens"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("gradient_checkpointing", "id2label", "label2id", "_num_labels", "output_past", "is_decoder"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "problem_type"),
    *("cross_attention_hidden_size", "tokenizer_class", "_attn_implementation_autoset", "attn_implementation"),
}


def model_from_hf(config: Mapping[str, Any], name: str) -> tuple[ModelConfig, list[str]]:
    """The model `name`, and the unknown keys of config.json, which were not used.

    Raises:
        UserError: a kind of model, a size or a setting that our GPT does not have; names the key.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in NORMS:
        raise UserError(f"model_type={show(kind)}: give a model of type {' or '.join(NORMS)}")
    sizes = {key: size(config, key) for key in LIMITS}
    for key, only in {**ONLY[kind], **ONLY_BOTH}.items():
        given = config.get(key, only[0])
        if not any(given == value and type(given) is type(value) for value in only):
            raise UserError(f"{key}={show(given)}: our {kind} has {key}={' or '.join(map(show, only))} only")
    if config.get("n_ctx", sizes["n_positions"]) != sizes["n_positions"]:
        raise UserError(f"n_ctx={show(config['n_ctx'])} is not n_positions={sizes['n_positions']}: make them equal")
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"n_inner={show(config['n_inner'])}: our MLP is 4 x n_embd={4 * sizes['n_embd']} wide")
    reals = {key: real(config, key, default) for key, default in DEFAULTS.items()}
    if len({reals[key] for key in DROPOUTS}) > 1:
        said = ", ".join(f"{key}={reals[key]}" for key in DROPOUTS)
        raise UserError(
            f"{said}: our model has one dropout: write one value into all three, such as 0 if you do not train it"
        )
    known = {*LIMITS, *DEFAULTS, *ONLY[kind], *ONLY_BOTH, *UNUSED, "n_ctx", "n_inner"}
    cfg = ModelConfig(
        name=name,
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        n_embd=sizes["n_embd"],
        n_ctx=sizes["n_positions"],
        vocab_size=sizes["vocab_size"],
        norm=NORMS[kind],
        gelu=Gelu.exact if config.get("activation_function") == "gelu" and kind == "gpt2" else Gelu.tanh,
        dropout=reals["embd_pdrop"],
        init_std=reals["initializer_range"],
        layer_norm_eps=reals["layer_norm_epsilon"],
    )
    return cfg, sorted(set(config) - known)


def hf_refusal(cfg: ModelConfig) -> str | None:
    """The reason why Hugging Face's formats cannot hold a model, in one line; None if they can."""
    if cfg.norm is Norm.post and cfg.gelu is Gelu.exact:
        return f"model={cfg.name} has norm=post with gelu=exact: Hugging Face's OpenAI GPT has GELU's tanh form only"
    if not cfg.sparse_layers:
        return None
    numbers = {"band": cfg.band, "stride": cfg.stride, "summary": cfg.summary}
    given = ", ".join([f"attention={cfg.attention}", *(f"{k}={v}" for k, v in numbers.items() if v is not None)])
    return (
        f"model={cfg.name} has {given} in n_ctx={cfg.n_ctx}: Hugging Face's GPT-2 and OpenAI GPT have dense attention "
        "only, and would compute something else from these weights"
    )


def size(config: Mapping[str, Any], key: str, limit: int | None = None) -> int:
    """The whole number of a key, from 1 to `limit` or to the key's own of LIMITS."""
    value, limit = config.get(key), limit or LIMITS[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise UserError(f"{key}={show(value)}: give a whole number from 1 to {limit:,}")
    return value


def real(config: Mapping[str, Any], key: str, default: float) -> float:
    """The number of a key, from 0 to 1."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise UserError(f"{key}={show(value)}: give a number from 0 to 1")
    return float(value)


def show(value: Any) -> str:
    """A value as in JSON, cut to 60 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_registry(tracking: TrackingConfig, model: ModelConfig) -> None:
    """Raises UserError for a model that a registry cannot hold."""
    if tracking.register is not None and (refusal := hf_refusal(model)):
        raise UserError(f"tracking.register={tracking.register}, but {refusal}: give tracking.register=null")
