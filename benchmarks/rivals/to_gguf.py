"""Convert a Qwen3-MoE safetensors checkpoint to GGUF, for llama.cpp, without loading it.

Matrices stay bf16, bit for bit; norms and routers become float32, as llama.cpp's own converter
makes them. Only headers and one chunk are ever in memory, so checkpoints larger than memory pass.
The vocabulary is good enough for token ids in, token ids out: the text pre-tokeniser is not carried
over, so prompts must be given as ids.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 16 * 2**20

_BF16 = gguf.GGMLQuantizationType.BF16
_F32 = gguf.GGMLQuantizationType.F32

# safetensors name inside a layer, GGUF name inside a block.
_LAYER_TENSORS = (
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate.weight", "ffn_gate_inp.weight"),
)
_EXPERT_TENSORS = (
    ("gate_proj.weight", "ffn_gate_exps.weight"),
    ("up_proj.weight", "ffn_up_exps.weight"),
    ("down_proj.weight", "ffn_down_exps.weight"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the checkpoint: where its bytes lie."""

    path: Path
    offset: int
    num_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the GGUF file: the parts that make it, one after the other."""

    name: str
    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, slowest dimension first; experts are stacked in front."""
        shape = self.parts[0].shape
        return (len(self.parts), *shape) if "_exps." in self.name else shape

    @property
    def dtype(self) -> gguf.GGMLQuantizationType:
        """The type it is stored in."""
        is_float32 = len(self.shape) == 1 or "ffn_gate_inp" in self.name
        return _F32 if is_float32 else _BF16

    @property
    def num_bytes(self) -> int:
        """Its size in the GGUF file."""
        return sum(part.num_bytes for part in self.parts) * (2 if self.dtype is _F32 else 1)


def read_sources(checkpoint: Path) -> dict[str, Source]:
    """Read the safetensors headers: name to place."""
    index = checkpoint / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    sources: dict[str, Source] = {}
    for file in sorted(files):
        path = checkpoint / file
        with path.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}; only BF16 checkpoints are converted")
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            sources[name] = Source(path, 8 + header_bytes + begin, end - begin, shape)
    return sources


def num_experts(config: dict[str, Any]) -> int:
    """Say how many experts a layer has; two names are in use."""
    return int(config["num_experts"] if "num_experts" in config else config["num_local_experts"])


def plan_targets(sources: dict[str, Source], config: dict[str, Any]) -> list[Target]:
    """List the GGUF tensors in the order they are written."""
    experts = range(num_experts(config))
    targets = [Target("token_embd.weight", (sources["model.embed_tokens.weight"],))]
    for layer in range(config["num_hidden_layers"]):
        source, block = f"model.layers.{layer}.", f"blk.{layer}."
        targets += [Target(block + to, (sources[source + name],)) for name, to in _LAYER_TENSORS]
        for name, to in _EXPERT_TENSORS:
            parts = tuple(sources[f"{source}mlp.experts.{expert}.{name}"] for expert in experts)
            targets.append(Target(block + to, parts))
    targets.append(Target("output_norm.weight", (sources["model.norm.weight"],)))
    if not config.get("tie_word_embeddings"):
        targets.append(Target("output.weight", (sources["lm_head.weight"],)))
    return targets


def check_config(config: dict[str, Any]) -> None:
    """Refuse what llama.cpp's qwen3moe graph would silently compute differently."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    problems = {
        "model_type is not qwen3_moe": config.get("model_type") != "qwen3_moe",
        "attention_bias": config.get("attention_bias"),
        "norm_topk_prob is off": not config.get("norm_topk_prob"),
        "some layers are dense": config.get("mlp_only_layers")
        or config.get("decoder_sparse_step", 1) != 1,
        "a sliding window": config.get("use_sliding_window"),
        "scaled rotary positions": rope.get("rope_type", "default") != "default",
    }
    if found := [name for name, is_found in problems.items() if is_found]:
        raise SystemExit(f"this checkpoint cannot be converted: {'; '.join(found)}")


def add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    """Write what llama.cpp needs to know about the architecture."""
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(num_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def read_vocabulary(
    tokenizer: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int], list[str]]:
    """Turn a byte-level BPE `tokenizer.json` into GGUF's tokens, token types and merges."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise SystemExit(f"the tokenizer is {model.get('type')}, not BPE")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return tokens, types, merges


def add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, Any]) -> None:
    """Write the vocabulary, and which tokens begin, end and pad."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens, types, merges = read_vocabulary(tokenizer, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for key, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if isinstance(config.get(key), int):
            add(config[key])


def read_chunks(source: Source) -> Iterator[bytes]:
    """Yield a tensor's bytes, a chunk at a time."""
    with source.path.open("rb") as stream:
        stream.seek(source.offset)
        left = source.num_bytes
        while left:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise SystemExit(f"{source.path} is shorter than its header says")
            left -= len(chunk)
            yield chunk


def to_float32(chunk: bytes) -> bytes:
    """Widen bf16 to float32, exactly."""
    return (np.frombuffer(chunk, dtype="<u2").astype("<u4") << 16).tobytes()


def write_target(stream: BinaryIO, target: Target, alignment: int) -> None:
    """Append one tensor, padded to the alignment."""
    for part in target.parts:
        for chunk in read_chunks(part):
            stream.write(to_float32(chunk) if target.dtype is _F32 else chunk)
    stream.write(bytes(-stream.tell() % alignment))


def convert(checkpoint: Path, output: Path) -> Path:
    """Convert a checkpoint.

    Args:
        checkpoint: Directory with `config.json`, `tokenizer.json` and safetensors files.
        output: The GGUF file to write; it appears under its name when it is complete.

    Returns:
        `output`.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    check_config(config)
    targets = plan_targets(read_sources(checkpoint), config)
    partial = output.with_name(output.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    try:
        add_hyperparameters(writer, config, checkpoint.resolve().name)
        add_vocabulary(writer, checkpoint, config)
        for target in targets:
            writer.add_tensor_info(
                target.name, target.shape, np.dtype("float32"), target.num_bytes, target.dtype
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("ab") as stream:
            stream.write(bytes(-stream.tell() % writer.data_alignment))
            for target in targets:
                write_target(stream, target, writer.data_alignment)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(output)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return output


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    path = convert(arguments.checkpoint, arguments.output)
    print(f"{path}: {path.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
