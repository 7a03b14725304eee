"""Widen a checkpoint so that it computes the same function from many times the bytes.

The residual stream and the experts' intermediate dimension are repeated `factor` times, and every
linear that reads a repeated dimension is divided by `factor`: each activation of the widened model
is the original's, repeated. Routing and text stay those of a trained model, while every expert
grows `factor` squared times: a benchmark of moving bytes whose predictions mean something. This
module must not change what the model computes, and must not hold more than a piece of a tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from foreload.errors import CheckpointError, ConfigError, UnsupportedModelError
from foreload.memory.writer import SafetensorsStreamWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["widen_checkpoint"]

# Pieces this large keep the whole run below 100 MB beyond torch itself, at the disk's speed.
PIECE_BYTES = 16 * 2**20

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What happens to a tensor's output rows and input columns; a vector has only rows."""

    rows: bool = False
    columns: bool = False
    divide: bool = False


_KEEP = _Rule()
_VECTOR = _Rule(rows=True)
_EMBED = _Rule(columns=True)
_READ = _Rule(columns=True, divide=True)
_WRITE = _Rule(rows=True)
_BOTH = _Rule(rows=True, columns=True, divide=True)

_LAYER = r"model\.layers\.\d+\."
_RULES = (
    (r"model\.embed_tokens\.weight", _EMBED),
    (r"model\.norm\.(weight|bias)", _VECTOR),
    (r"lm_head\.weight", _READ),
    (r"lm_head\.bias", _KEEP),
    (_LAYER + r"(input|post_attention)_layernorm\.(weight|bias)", _VECTOR),
    (_LAYER + r"self_attn\.[qkv]_proj\.weight", _READ),
    (_LAYER + r"self_attn\.[qkv]_proj\.bias", _KEEP),
    (_LAYER + r"self_attn\.[qk]_norm\.weight", _KEEP),
    (_LAYER + r"self_attn\.o_proj\.weight", _WRITE),
    (_LAYER + r"self_attn\.o_proj\.bias", _VECTOR),
    (_LAYER + r"(mlp|block_sparse_moe)\.gate\.weight", _READ),
    (_LAYER + r"mlp\.shared_expert_gate\.weight", _READ),
    (_LAYER + r"mlp\.((experts\.\d+|shared_expert)\.)?(gate|up|down)_proj\.weight", _BOTH),
    (_LAYER + r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", _BOTH),
)
# OLMoE in transformers sizes q_norm by hidden_size, so its heads must be repeated too. Repeated
# queries meet repeated keys: each copy of a head gives the same output.
_REPEATED_HEADS = (
    (_LAYER + r"self_attn\.[qkvo]_proj\.weight", _BOTH),
    (_LAYER + r"self_attn\.[qkvo]_proj\.bias", _VECTOR),
    (_LAYER + r"self_attn\.[qk]_norm\.weight", _VECTOR),
    *_RULES,
)


@dataclass(frozen=True, slots=True)
class _Family:
    """Which numbers of `config.json` grow, and which rules hold."""

    widths: tuple[str, ...]
    rules: tuple[tuple[str, _Rule], ...] = _RULES


# Only families whose widened logits a test compares with the original's: a family may also hide a
# dependence on the width in its code, as Gemma's embeddings do.
_FAMILIES = {
    "qwen3_moe": _Family(("hidden_size", "intermediate_size", "moe_intermediate_size")),
    "qwen2_moe": _Family(
        (
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        )
    ),
    "mixtral": _Family(("hidden_size", "intermediate_size")),
    "phimoe": _Family(("hidden_size", "intermediate_size")),
    "olmoe": _Family(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        _REPEATED_HEADS,
    ),
}


@dataclass(frozen=True, slots=True)
class _Source:
    """One tensor of the source: its lazy slice, and how it is widened."""

    view: Any
    dtype: torch.dtype
    shape: tuple[int, ...]
    rule: _Rule


def widen_checkpoint(
    source_dir: str | Path,
    output_dir: str | Path,
    factor: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint that computes the same with `factor` squared times the expert bytes.

    Logits agree up to rounding: the divisions are exact, but sums have more terms. Tied embeddings
    stay tied, with the division moved into the final norm. Runs of other programs see an ordinary
    checkpoint; `foreload_widen_factor` in `config.json` says what it is.

    Args:
        source_dir: A checkpoint of the qwen3_moe, qwen2_moe, mixtral, phimoe or olmoe family.
        output_dir: Where the result appears once it is complete. Must not exist, or be empty.
        factor: A power of two, at least 2.
        progress: Called with the bytes written and the bytes in total.

    Returns:
        `output_dir`.

    Raises:
        ConfigError: The factor or `output_dir` does not do.
        CheckpointError: The source is incomplete or damaged.
        UnsupportedModelError: The family, the quantisation or a tensor is not known here.
        CapacityError: The disk is full; nothing is left behind.

    Cost:
        About 60 MB of memory; reads the source, writes `factor` squared times its expert bytes.
    """
    if factor < 2 or factor & (factor - 1):
        raise ConfigError(
            f"factor must be a power of two of at least 2, not {factor}",
            hint="only a power of two divides floating-point weights exactly",
        )
    source_dir = Path(source_dir)
    config = _read_json(source_dir / "config.json")
    family = _family(config)
    with ExitStack() as stack:
        sources = _open_sources(source_dir, family, bool(config.get("tie_word_embeddings")), stack)
        writer = stack.enter_context(SafetensorsStreamWriter(output_dir))
        for name, source in sources.items():
            writer.declare(name, source.dtype, _widened_shape(source, factor))
        names = writer.names
        config = _widened_config(config, family, sources, factor)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (writer.directory / "config.json").write_text(text)
        _copy_other_files(source_dir, writer.directory, factor)
        for name in names:
            writer.write(name, _widened_pieces(sources[name], factor))
            if progress is not None:
                progress(writer.bytes_written, writer.total_bytes)
    return Path(output_dir)


def _family(config: dict[str, Any]) -> _Family:
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"checkpoints of the type {model_type!r} cannot be widened",
            hint="supported are " + ", ".join(sorted(_FAMILIES)),
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError("a quantised checkpoint cannot be widened")
    return _FAMILIES[model_type]


def _open_sources(
    source_dir: Path, family: _Family, is_tied: bool, stack: ExitStack
) -> dict[str, _Source]:
    """Open every tensor lazily and find its rule."""
    views = dict(_open_views(source_dir, stack))
    if is_tied:
        views.pop("lm_head.weight", None)
    elif "lm_head.weight" not in views:
        raise CheckpointError(f"{source_dir} has neither lm_head.weight nor tied embeddings")
    rules = {name: _rule(name, family) for name in views}
    if unknown := [name for name, rule in rules.items() if rule is None]:
        raise UnsupportedModelError(
            f"{len(unknown)} tensors cannot be widened because their role is not known, "
            f"first {', '.join(sorted(unknown)[:3])}"
        )
    sources = {}
    for name, rule in rules.items():
        shape, code = tuple(views[name].get_shape()), views[name].get_dtype()
        if code not in _DTYPES or len(shape) not in (1, 2):
            raise UnsupportedModelError(
                f"{name} of type {code} and shape {shape} cannot be widened"
            )
        if is_tied and name.startswith("model.norm."):
            rule = replace(rule or _VECTOR, divide=True)
        sources[name] = _Source(views[name], _DTYPES[code], shape, rule or _KEEP)
    return sources


def _open_views(source_dir: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    path = source_dir / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if path.exists():
        files = set(_read_json(path).get("weight_map", {}).values())
    for file in sorted(files):
        try:
            reader = stack.enter_context(safe_open(source_dir / file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{source_dir / file} cannot be read: {error}") from error
        for name in reader.keys():  # noqa: SIM118
            yield name, reader.get_slice(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="give the folder of a whole checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _rule(name: str, family: _Family) -> _Rule | None:
    for pattern, rule in family.rules:
        if re.fullmatch(pattern, name):
            return rule
    return None


def _widened_shape(source: _Source, factor: int) -> tuple[int, ...]:
    repeats = (factor if source.rule.rows else 1, factor if source.rule.columns else 1)
    return tuple(size * repeat for size, repeat in zip(source.shape, repeats, strict=False))


def _widened_pieces(source: _Source, factor: int) -> Iterator[Tensor]:
    """Yield the widened tensor's rows from top to bottom, a few at a time."""
    rule = source.rule
    num_columns = factor if rule.columns and len(source.shape) == 2 else 1
    row_bytes = source.dtype.itemsize * num_columns
    if len(source.shape) == 2:
        row_bytes *= source.shape[1]
    num_rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for _ in range(factor if rule.rows else 1):
        for start in range(0, source.shape[0], num_rows):
            piece: Tensor = source.view[start : start + num_rows]
            if rule.divide:
                piece = piece / factor
            yield piece.repeat(1, num_columns) if num_columns > 1 else piece


def _widened_config(
    config: dict[str, Any], family: _Family, sources: dict[str, _Source], factor: int
) -> dict[str, Any]:
    keys = (*family.widths, "num_attention_heads")
    if missing := [key for key in keys if not isinstance(config.get(key), int)]:
        raise CheckpointError(f"config.json does not give {', '.join(missing)}")
    query_rows = next(
        (s.shape[0] for name, s in sources.items() if name.endswith("q_proj.weight")), None
    )
    if query_rows is None:
        raise CheckpointError("the checkpoint has no q_proj.weight")
    widened = {key: config[key] * factor for key in family.widths}
    # Most families derive it from hidden_size, which no longer says it.
    widened["head_dim"] = query_rows // config["num_attention_heads"]
    # Widening twice multiplies.
    widened["foreload_widen_factor"] = factor * config.get("foreload_widen_factor", 1)
    return {**config, **widened}


def _copy_other_files(source_dir: Path, directory: Path, factor: int) -> None:
    for pattern in _COPIED:
        for path in source_dir.glob(pattern):
            shutil.copyfile(path, directory / path.name)
    (directory / "README.md").write_text(
        f"# {source_dir.resolve().name}, widened {factor} times\n\n"
        f"Computes the same function as its source, with {factor * factor} times the bytes per "
        "expert. Made by foreload to benchmark the movement of experts. It is not a better model, "
        "and its size says nothing about its quality.\n"
    )
