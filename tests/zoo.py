"""Tiny random models of every Mixture-of-Experts architecture that transformers can run.

`decorated_architectures` asks the installed transformers which architectures call their
experts through its experts interface. `build_tiny` shrinks the default configuration of one
of them until the model has well under a million parameters, and makes all of them random.

Nothing here may import foreload: the zoo is the reference the engine is compared with.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, Mxfp4Config, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import quantizer_finegrained_fp8

if TYPE_CHECKING:
    from types import ModuleType

VOCABULARY = 199
PROMPT_TOKENS = 24
LAYERS = 3
EXPERTS = 8
TOP_K = 2
FP8_BLOCK = 16

# What use_experts_implementation gives to the classes that it decorates.
EXPERTS_MARKS = ("is_transposed", "has_gate", "has_bias", "_apply_gate")

# Endings of class names, the most useful for text generation first. A model that is not for
# generation at all still counts: its experts run the same way.
CLASS_ENDINGS = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForBlockDiffusion",
    "ForTokenClassification",
    "TextModel",
    "Model",
)

# Where the first class by `CLASS_ENDINGS` is not the one that runs on text.
MODEL_CLASSES = {
    # The whole of Qwen3-Omni has no forward; the talker needs the hidden states of the thinker.
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}

# The first pattern that matches the whole name decides; no number is ever made larger.
SHRINK_RULES: tuple[tuple[str, int], ...] = (
    (r"(unpadded_)?vocab_size.*", VOCABULARY),
    (r"num_hidden_layers|num_layers|depth|encoder_layers", LAYERS),
    (r"(shared_)?intermediate_size|.*_(intermediate|ffn_hidden)_size|.*(mlp|ffn)_dim", 48),
    (r"downsample_hidden_size", 16),
    (r".*hidden_size|d_model|output_dim|output_channels|adapter_(input_size|out_dim)", 64),
    (r"(encoder_)?(num_attention_heads|attention_heads|num_heads)", 4),
    (r"num_key_value_heads", 2),
    (r"qk_rope_head_dim", 8),
    (r".*head_dim", 16),
    (r".*lora_rank|moe_latent_size", 32),
    (r"(num|num_local|n_routed|moe_num|num_moe)_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k(_experts)?|num_selected_experts", TOP_K),
    (r"n_group|(moe_)?num_expert_group|topk_group|n_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_dense_layers", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"max_position_embeddings|model_max_length|num_position_embeddings", 256),
    (r"position_embedding_size|(max_)?image_size", 64),
    (r"sliding_window|index_topk", 16),
    (r"linear_num_(key_|value_)?heads|mamba_n(um)?_heads", 4),
    (r"mamba_d_head", 32),
    (r"mamba_d_state|ssm_state_size", 8),
    (r"index_n_heads", 2),
    (r"num_nextn_predict_layers|num_mtp.*", 0),
    (r"(bos|eos|pad)_token_id", 2),
    (r".*_token_(id|index)", VOCABULARY - 1),
)

# Left out of a shrunk configuration, so that its class derives them from the shrunk values.
DERIVED = ("per_layer_config", "qk_head_dim", "transformers_version", "architectures")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What the rules cannot know: values that have no default, sizes tied to one another, and
# layer patterns in which three layers would otherwise not show every kind of layer.
TINY_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_experts_per_tok": TOP_K,
        },
        "vision_config": {
            "sam_config": {"downsample_channels": [32, 64], "global_attn_indexes": [2]},
        },
    },
    "deepseek_v2": {"num_experts_per_tok": TOP_K, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "diffusion_gemma": {
        "canvas_length": 8,
        "text_config": {
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 48,
            "global_head_dim": 16,
        },
        # Complete, because 5.17 has no default for it.
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "position_embedding_size": 64,
        },
    },
    "dots1": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": TOP_K,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "head_dim": 32,
        "qk_nope_head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 24,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [48, 32],
            "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
        },
    },
    "flex_olmo": {"num_experts": EXPERTS},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": 48,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                **_ROPE,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2],
            },
        },
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_chunk_size": 16,
    },
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 16},
    "hy_v4_vl": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    },
    "inkling2": {"vision_config": {"projection_hidden_dim": 64}},
    "inkling2_loop": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "muse_spark": {
        "text_config": {"output_multiplier": 1.0},  # else the router hardly tells tokens apart
        "audio_config": {
            "patch_sizes": [4, 2, 2],
            "hidden_sizes": [16, 16, 16],
            "depths": [1, 1, 1],
        },
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mtp_layers_block_type": [],
        "use_mamba_kernels": False,
    },
    "qwen3_omni_moe": {  # read while decoding, and without a default
        "vision_start_token_id": VOCABULARY - 2,
        "audio_start_token_id": VOCABULARY - 3,
    },
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
    },
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {"downsample_channels": [32, 64], "global_attn_indexes": [2]},
        },
    },
}

# Architectures that cannot be built tiny, and why. A name that does build fails the tests.
CANNOT_BUILD: dict[str, str] = {}

_FAMILY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK_FAMILY: dict[str, Any] = {
    **_FAMILY,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

# The families most tests use: complete configurations, a little larger than the tiny ones.
SEVEN_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_FAMILY,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        **_FAMILY,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmoe": {
        **_FAMILY,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "deepseek_v2": {
        **_DEEPSEEK_FAMILY,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v3": {**_DEEPSEEK_FAMILY, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    "gpt_oss": {
        **_FAMILY,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,  # a multiple of 32, the length of an MXFP4 block
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "sliding_window": 16,
    },
    "phimoe": {
        **_FAMILY,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,  # PhiMoE's router is written for two
    },
}


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """A saved model, and what it takes to load and to run the reference."""

    path: Path
    model_class: type[PreTrainedModel]
    input_ids: Tensor  # (1, T)
    extra_inputs: dict[str, Tensor] = field(default_factory=dict)
    dequantise: FineGrainedFP8Config | Mxfp4Config | None = None

    @property
    def arch(self) -> str:
        """Name of the architecture's package in transformers.models."""
        return self.model_class.__module__.split(".")[-2]

    def load_reference(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Load the model as transformers does, all of it in memory, with eager experts."""
        quantisation = {"quantization_config": self.dequantise} if self.dequantise else {}
        # transformers wants accelerate before it reads FP8, though dequantising never uses it.
        with mock.patch.object(
            quantizer_finegrained_fp8, "is_accelerate_available", return_value=True
        ):
            model = self.model_class.from_pretrained(
                self.path, experts_implementation="eager", dtype=dtype, **quantisation
            )
        # Weights mapped from the file start at any multiple of 8 bytes, and torch's product of
        # one float32 row with a matrix rounds differently where that is no multiple of 16.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.eval()


def decorated_architectures() -> list[str]:
    """Name the transformers.models packages whose experts use the experts interface.

    Reads the modeling files of the installed transformers as text and imports none of them.
    """
    models = Path(transformers.__file__).parent / "models"
    decorator = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
    return sorted(
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if decorator.search(file.read_text(encoding="utf-8"))
    )


def buildable_architectures() -> list[str]:
    """Name the decorated architectures that `build_tiny` can build."""
    return [arch for arch in decorated_architectures() if arch not in CANNOT_BUILD]


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds the experts of one layer."""
    return all(hasattr(module, mark) for mark in EXPERTS_MARKS)


def model_class(arch: str) -> type[PreTrainedModel]:
    """Choose an architecture's model class: the one for text generation if there is one."""
    module = _modeling(arch)
    if arch in MODEL_CLASSES:
        return getattr(module, MODEL_CLASSES[arch])
    names = sorted(
        name
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, PreTrainedModel) and not name.endswith("PreTrainedModel")
        if cls.__module__ == module.__name__
    )
    for ending in CLASS_ENDINGS:
        for name in names:
            if name.endswith(ending):
                return getattr(module, name)
    raise LookupError(f"{arch}: no model class among {names}")


def tiny_config(arch: str) -> PreTrainedConfig:
    """Shrink an architecture's default configuration by the rules and its overrides."""
    config_class = model_class(arch).config_class
    values = _merge(_shrink(config_class().to_dict()), TINY_OVERRIDES.get(arch, {}))
    return config_class(**values)


def build_tiny(arch: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Build an architecture's tiny model, every weight random, in evaluation mode."""
    return _build(model_class(arch), tiny_config(arch), dtype, seed)


def build_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Build one of `SEVEN_FAMILIES`, every weight random, in evaluation mode."""
    cls = model_class(name)
    return _build(cls, cls.config_class(**SEVEN_FAMILIES[name]), dtype, seed)


def save_tiny(
    arch: str, directory: Path | str, dtype: torch.dtype = torch.float32
) -> TinyCheckpoint:
    """Write an architecture's tiny model as a checkpoint of several shards."""
    return _save(build_tiny(arch, dtype), Path(directory))


def save_small(path: Path) -> None:
    """Save Qwen3-MoE with two layers of four experts, two at a time, in float32."""
    cls = model_class("qwen3_moe")
    settings = {
        **SEVEN_FAMILIES["qwen3_moe"],
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [],
    }
    _save(_build(cls, cls.config_class(**settings), torch.float32, seed=0), path)


def save_family(
    name: str, directory: Path | str, dtype: torch.dtype = torch.float32
) -> TinyCheckpoint:
    """Write one of `SEVEN_FAMILIES` as a checkpoint of several shards."""
    return _save(build_family(name, dtype), Path(directory))


def save_quantised(
    kind: Literal["fp8", "mxfp4"], arch: str, directory: Path | str
) -> TinyCheckpoint:
    """Write one of `SEVEN_FAMILIES` the way its vendor ships it: with quantised experts.

    "fp8" (qwen3_moe, deepseek_v3) scales blocks of 16 x 16 weights, in attention and MLP
    projections as well as in the experts. "mxfp4" (gpt_oss) replaces the experts by random
    blocks and scales. `TinyCheckpoint.load_reference` dequantises both.
    """
    directory = Path(directory)
    plain = save_family(arch, directory / "unquantised", torch.bfloat16)
    weights = {k: v for file in _shards(plain.path) for k, v in load_file(file).items()}
    dequantise: FineGrainedFP8Config | Mxfp4Config
    if kind == "fp8":
        weights = _block_fp8(weights)
        dequantise = FineGrainedFP8Config(dequantize=True, weight_block_size=(FP8_BLOCK, FP8_BLOCK))
        described: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": ["lm_head", "gate"],
        }
    else:
        weights = _random_mxfp4(weights)
        dequantise = Mxfp4Config(dequantize=True)
        described = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    path = directory / kind
    path.mkdir(parents=True)
    config = json.loads((plain.path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = described
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _save_shards(weights, path)
    return TinyCheckpoint(path, plain.model_class, plain.input_ids, dequantise=dequantise)


def prompt(tokens: int = PROMPT_TOKENS) -> Tensor:
    """Make a prompt, (1, `tokens`), free of special tokens and of repetitions."""
    return 3 + (torch.arange(tokens)[None] * 7) % (VOCABULARY - 4)


def extra_inputs(arch: str) -> dict[str, Tensor]:
    """Give what an architecture's forward wants besides input_ids."""
    if arch == "diffusion_gemma":
        return {"decoder_input_ids": prompt(8) + 1}  # else the canvas is drawn at random
    return {}


def _modeling(arch: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Apply `SHRINK_RULES` to a configuration and to the configurations inside it."""
    layers = config.get("num_hidden_layers")
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in DERIVED:
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[key] = _shrink(value)
        elif isinstance(value, list) and len(value) == layers:
            small[key] = _first_of_each_kind(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            limits = (limit for name, limit in SHRINK_RULES if re.fullmatch(name, key))
            small[key] = min(value, next(limits, value))
        else:
            small[key] = value
    heads = config.get("num_attention_heads")
    if heads is not None and heads == config.get("num_key_value_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small:
        # Latent attention rotates these dimensions only, and sizes its rotation by head_dim.
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def _first_of_each_kind(per_layer: list[Any]) -> list[Any]:
    """Cut a per-layer list to `LAYERS` entries that show as many kinds of layers as possible."""
    kinds = [kind for i, kind in enumerate(per_layer) if kind not in per_layer[:i]]
    repeated = [kinds[-1 if "sparse" in kinds else 0]] * (LAYERS - len(kinds))
    return (kinds + repeated if "sparse" in kinds else repeated + kinds)[:LAYERS]


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Apply overrides; those for a configuration inside the configuration are merged into it."""
    merged = dict(values)
    for key, change in changes.items():
        inner = merged.get(key)
        nested = isinstance(inner, dict) and "model_type" in inner
        merged[key] = _merge(inner, change) if nested else change
    return merged


def _build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=dtype)
    if not any(is_experts(module) for module in model.modules()):
        raise LookupError(f"{cls.__name__} has no experts with this configuration")
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill every parameter, and every buffer that routes, with random numbers.

    Matrices are drawn anew. Vectors scatter around what they were initialised with: norms
    around one, biases around zero.
    """
    saved = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(parameter.float() + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name in saved and "bias" in name:
                # They are added to scores between 0 and 1, and would drown them if larger.
                buffer.add_(0.03 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("tid2eid"):  # (V, K), K different experts for each token
                scores = torch.rand(len(buffer), EXPERTS, generator=generator)
                buffer.copy_(scores.topk(buffer.shape[1]).indices)


def _save(model: PreTrainedModel, path: Path) -> TinyCheckpoint:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    model.save_pretrained(path, max_shard_size=size // 3)
    checkpoint = TinyCheckpoint(path, type(model), prompt())
    return replace(checkpoint, extra_inputs=extra_inputs(checkpoint.arch))


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _save_shards(weights: dict[str, Tensor], path: Path, count: int = 3) -> None:
    names = sorted(weights)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = {name: weights[name].contiguous() for name in names[i::count]}
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _block_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise every projection matrix by blocks, as DeepSeek and Qwen do."""
    quantised = {}
    for name, weight in weights.items():
        divides = all(size % FP8_BLOCK == 0 for size in weight.shape)
        if "_proj" not in name or weight.dim() != 2 or not divides:
            quantised[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        scaled = blocks / scale[:, None, :, None]
        quantised[name] = scaled.view(rows, columns).to(torch.float8_e4m3fn)
        quantised[f"{name}_scale_inv"] = scale
    return quantised


def _random_mxfp4(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace packed experts by random MXFP4: blocks of 32 four-bit numbers, one scale each."""
    generator = torch.Generator().manual_seed(0)
    quantised = {}
    for name, weight in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantised[name] = weight
            continue
        experts, columns, rows = weight.shape  # gpt-oss keeps its matrices transposed
        blocks = (experts, rows, columns // 32)
        quantised[f"{name}_blocks"] = torch.randint(
            0, 256, (*blocks, 16), dtype=torch.uint8, generator=generator
        )
        # Exponents with an offset of 127: weights of about 0.01 to 0.4.
        quantised[f"{name}_scales"] = torch.randint(
            118, 124, blocks, dtype=torch.uint8, generator=generator
        )
    return quantised
