"""Write checkpoints of well-known shapes with random weights, to time the movement of experts.

The bytes, the tensor names and the number of experts are those of the named model; the text is
noise and the routing that of random routers, flatter than a trained model's. So nothing here may
serve to judge predictors, drafts or caches: only bandwidth and overheads. There is no tokenizer;
prompts are token ids.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreload.errors import ConfigError
from foreload.memory.writer import SafetensorsStreamWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "RANDOM_MODELS",
    "make_random_checkpoint",
    "random_model_config",
    "write_random_checkpoint",
]

# Weights are cut from one block of normals. Its length is prime, so that rows of a large matrix,
# whatever their width, start at different places of the block and differ.
BLOCK_ELEMENTS = 33_554_393
PIECE_ELEMENTS = 4 * 2**20

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
}
_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}

# As published by the models' authors; scalings of the rotary embedding, which cost nothing, are
# left at transformers' defaults. gpt-oss is bfloat16 here, not MXFP4 as published.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    },
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "phi-3.5-moe": {
        "model_type": "phimoe",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "max_position_embeddings": 8192,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
    },
    "qwen3-235b-a22b": {
        **_QWEN3_MOE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
}


@dataclass(frozen=True, slots=True)
class _Distribution:
    """A tensor's values: normal of deviation `std`, or all `fill` where `std` is 0."""

    std: float
    fill: float = 0.0


def make_random_checkpoint(
    name: str,
    output_dir: str | Path,
    *,
    num_layers: int | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a random checkpoint with the shapes of a well-known model.

    Args:
        name: A key of `RANDOM_MODELS`.
        output_dir: Where the result appears once it is complete. Must not exist, or be empty.
        num_layers: Keep this many layers, the first ones; all where None.
        dtype: `bfloat16`, `float16` or `float32`.
        seed: The same seed gives the same bytes.
        progress: Called with the bytes written and the bytes in total.

    Returns:
        `output_dir`.

    Raises:
        ConfigError: A name, number or `output_dir` does not do.
        CapacityError: The disk is full; nothing is left behind.
    """
    config = random_model_config(name, num_layers=num_layers)
    return write_random_checkpoint(config, output_dir, dtype=dtype, seed=seed, progress=progress)


def random_model_config(name: str, *, num_layers: int | None = None) -> Any:
    """Give transformers' configuration for one of `RANDOM_MODELS`.

    It names no end-of-sequence token: a timing run must not end by chance.
    """
    from transformers import AutoConfig

    if name not in RANDOM_MODELS:
        raise ConfigError(
            f"{name!r} is not a known shape", hint="known are " + ", ".join(sorted(RANDOM_MODELS))
        )
    settings = dict(RANDOM_MODELS[name])
    if num_layers is not None:
        dense = settings.get("first_k_dense_replace", 0)
        if not dense < num_layers <= settings["num_hidden_layers"]:
            raise ConfigError(
                f"{name} has {settings['num_hidden_layers']} layers, {dense} of them dense; "
                f"num_layers cannot be {num_layers}"
            )
        settings["num_hidden_layers"] = num_layers
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model_type = settings.pop("model_type")
    return AutoConfig.for_model(model_type, tie_word_embeddings=False, **tokens, **settings)


def write_random_checkpoint(
    config: Any,
    output_dir: str | Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write random weights for any causal language model that transformers can build.

    Names and layout are those that `save_pretrained` would write. `config.json` carries
    `foreload_random_weights: true`.

    Args:
        config: transformers' configuration.
        output_dir: Where the result appears once it is complete. Must not exist, or be empty.
        dtype: `bfloat16`, `float16` or `float32`.
        seed: The same seed gives the same bytes.
        progress: Called with the bytes written and the bytes in total.

    Returns:
        `output_dir`.

    Raises:
        ConfigError: The type or `output_dir` does not do.
        CapacityError: The disk is full; nothing is left behind.

    Cost:
        One block of 64 MB (bfloat16) or 128 MB (float32) in memory, whatever the model's size.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    torch_dtype = _DTYPES[dtype]
    architecture, layout = _checkpoint_layout(config)
    config.architectures = [architecture]
    config.dtype = torch_dtype
    config.foreload_random_weights = True
    with SafetensorsStreamWriter(output_dir) as writer:
        for name, shape in layout.items():
            writer.declare(name, torch_dtype, shape)
        names = writer.names
        config.save_pretrained(writer.directory)
        _write_readme(writer.directory / "README.md", config.model_type)
        generator = torch.Generator().manual_seed(seed)
        block = torch.empty(BLOCK_ELEMENTS, dtype=torch_dtype).normal_(generator=generator)
        for name in names:
            values = _distribution(name, layout[name], config)
            start = zlib.crc32(f"{seed}/{name}".encode()) % BLOCK_ELEMENTS
            writer.write(name, _pieces(layout[name], values, block, start))
            if progress is not None:
                progress(writer.bytes_written, writer.total_bytes)
    return Path(output_dir)


def _checkpoint_layout(config: Any) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Give the architecture's name, and the shapes that `save_pretrained` would write."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, Tensor] = revert_weight_conversion(model, dict(model.state_dict()))
    if config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return type(model).__name__, {name: tuple(t.shape) for name, t in tensors.items()}


def _distribution(name: str, shape: tuple[int, ...], config: Any) -> _Distribution:
    """Choose values that keep activations near one and let routing follow the token."""
    if name.endswith(("bias", "sinks")):
        return _Distribution(0.0)
    if len(shape) == 1:
        return _Distribution(0.0, fill=1.0)
    if name.endswith("embed_tokens.weight"):
        return _Distribution(1.0)
    # gpt-oss stores its packed experts input first.
    fan_in = shape[-2] if config.model_type == "gpt_oss" and len(shape) == 3 else shape[-1]
    std = fan_in**-0.5
    if re.search(r"(o_proj|down_proj|w2)(\.weight)?$", name):
        # The residual then keeps the token's own embedding on top, and tokens route apart.
        std *= (2 * config.get_text_config().num_hidden_layers) ** -0.5
    return _Distribution(std)


def _pieces(
    shape: tuple[int, ...], values: _Distribution, block: Tensor, start: int
) -> Iterator[Tensor]:
    left = math.prod(shape)
    while left:
        size = min(left, PIECE_ELEMENTS, BLOCK_ELEMENTS - start)
        if values.std:
            yield block[start : start + size] * values.std
        else:
            yield torch.full((size,), values.fill, dtype=block.dtype)
        start = (start + size) % BLOCK_ELEMENTS
        left -= size


def _write_readme(path: Path, model_type: str) -> None:
    path.write_text(
        f"# Random weights in the shape of a {model_type} model\n\n"
        "For timing only: made by foreload, never trained. Its text is noise, and its routing says "
        "nothing about a trained model's. It has no tokenizer; prompts are token ids.\n"
    )
