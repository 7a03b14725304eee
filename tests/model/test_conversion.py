"""transformers' rules, and the one that foreload repairs."""

from __future__ import annotations

import torch
from transformers import FineGrainedFP8Config
from transformers.quantizers.auto import AutoHfQuantizer

import zoo
from foreload.model.conversion import conversion_mapping


def test_without_a_quantizer_the_rules_are_transformers_own() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = zoo.build_tiny("qwen3_moe")
    assert repr(conversion_mapping(model, None)) == repr(get_model_conversion_mapping(model))


def test_a_block_cut_off_at_the_edge_is_dequantised() -> None:
    settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    rules = [
        (rule.source_patterns, operation)
        for rule in conversion_mapping(zoo.build_tiny("deepseek_v3"), quantizer)
        for operation in getattr(rule, "operations", ())
        if "Fp8Dequantize" in type(operation).__name__
    ]
    assert rules
    grid = torch.rand(3, 2)
    weight = torch.randn(40, 32).to(torch.float8_e4m3fn)  # 40 is two and a half blocks
    wanted = weight.float() * grid.repeat_interleave(16, 0).repeat_interleave(16, 1)[:40]
    for patterns, operation in rules:
        # some versions end their patterns with an anchor
        weights = next(name for name in patterns if name.endswith(("weight", "weight$")))
        scales = next(name for name in patterns if "weight_scale_inv" in name)
        for rows, blocks in ((40, 3), (32, 2)):
            (found,) = operation.convert(
                {weights: [weight[:rows]], scales: [grid[:blocks]]}
            ).values()
            found = found[0] if isinstance(found, list) else found
            assert torch.equal(found, wanted[:rows])
