"""Give transformers' rules for turning a checkpoint's tensors into a model's parameters.

The rules are transformers' own, with one repair: block-FP8 matrices whose last block is cut off,
such as DeepSeek-V3's 576-row projection, are dequantised instead of refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["conversion_mapping"]


def conversion_mapping(model: Any, quantizer: Any | None) -> list[Any]:
    """List the renamings and converters that apply to `model`, in transformers' order.

    Args:
        model: A transformers model; its module tree decides which rules apply.
        quantizer: transformers' quantizer, set to dequantise, or None.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = list(get_model_conversion_mapping(model, hf_quantizer=quantizer))
    block = getattr(getattr(quantizer, "quantization_config", None), "weight_block_size", None)
    if block is None:
        return mapping
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    repaired = _ragged_dequantize(Fp8Dequantize, (int(block[0]), int(block[1])))
    for rule in mapping:
        operations = getattr(rule, "operations", None)
        if operations is not None:
            rule.operations = [
                repaired(quantizer) if type(op) is Fp8Dequantize else op for op in operations
            ]
    return mapping


def _ragged_dequantize(base: type[Any], block: tuple[int, int]) -> type[Any]:
    """Give a subclass of transformers' operation that also takes blocks cut off at the edge."""

    class RaggedFp8Dequantize(base):  # type: ignore[misc]
        def _dequantize_one(self, quantized: Tensor, scales: Tensor, **kwargs: Any) -> Tensor:
            rows, columns = quantized.shape[-2:]
            if scales.dim() < 2 or not (rows % scales.shape[-2] or columns % scales.shape[-1]):
                whole: Tensor = super()._dequantize_one(quantized, scales, **kwargs)
                return whole
            height, width = scales.shape[-2] * block[0], scales.shape[-1] * block[1]
            padding = (0, width - columns, 0, height - rows)
            # torch cannot pad FP8, but bytes of zero are FP8 zeros
            padded = torch.nn.functional.pad(quantized.view(torch.uint8), padding)
            result: Tensor = super()._dequantize_one(padded.view(quantized.dtype), scales, **kwargs)
            return result[..., :rows, :columns].contiguous()

    return RaggedFp8Dequantize
