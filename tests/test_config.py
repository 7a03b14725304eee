"""Settings that make sense are taken, and all others are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreload.config import (
    EngineConfig,
    SamplingConfig,
    check_whole,
    format_bytes,
    parse_size,
)
from foreload.errors import ConfigError


def parse(text: Any, whole: int = 1000) -> int:
    return parse_size(text, whole_bytes=whole, setting="expert_memory")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (123, 123),
        ("123", 123),
        ("2KiB", 2048),
        ("2 kib", 2048),
        ("2k", 2048),
        ("2KB", 2000),
        ("1.5MiB", 3 << 19),
        ("3MB", 3_000_000),
        ("1GiB", 1 << 30),
        ("1GB", 10**9),
        (" .5 TiB ", 1 << 39),
        ("7b", 7),
        ("25%", 250),
        ("12.5 %", 125),
        ("150%", 1500),
    ],
)
def test_sizes_are_read_as_people_write_them(text: Any, num_bytes: int) -> None:
    assert parse(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "much", "2 GiBs", "GiB", "-1GiB", "1e9", "%", "2%%", "1,000", None, 0.25, True, []]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"expert_memory=.*is not a size") as caught:
        parse(text)
    assert '"25%"' in str(caught.value.hint)


@pytest.mark.parametrize("text", [0, -5, "0", "0%", "0.1", "0.01%"])
def test_less_than_a_byte_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="more than nothing") as caught:
        parse(text)
    assert '"25%"' in str(caught.value.hint)


@pytest.mark.parametrize(
    "text", [2**63, str(2**63), "9" * 400, "9" * 400 + "%", "1" * 400 + "GiB", "9000000 TiB"]
)
def test_more_than_any_machine_has_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="more than any machine has"):
        parse(text)


@pytest.mark.parametrize("value", [0, -1, 8, 1.5, "2", None, True])
def test_numbers_outside_their_bounds_are_refused(value: Any) -> None:
    check_whole("width", 1, least=1, most=7)
    check_whole("width", 7, least=1, most=7)
    check_whole("width", 10**30, least=1)
    with pytest.raises(ConfigError, match=r"width=.* must be a whole number from 1 to 7"):
        check_whole("width", value, least=1, most=7)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (655360, "640.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


class TestEngineConfig:
    def test_the_defaults_are_valid_and_frozen(self) -> None:
        config = EngineConfig()
        assert config.model == "demo"
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.model = "other"  # type: ignore[misc]

    @pytest.mark.parametrize("name", EngineConfig.CHOICES)
    def test_every_choice_is_taken_and_others_are_refused(self, name: str) -> None:
        for choice in EngineConfig.CHOICES[name]:
            assert getattr(EngineConfig(**{name: choice}), name) == choice
        with pytest.raises(ConfigError, match=f"{name}='nonsense'") as caught:
            EngineConfig(**{name: "nonsense"})
        assert EngineConfig.CHOICES[name][-1] in str(caught.value.hint)

    def test_devices_are_named_as_torch_names_them(self) -> None:
        for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:12"):
            assert EngineConfig(device=device).device == device
        for device in ("gpu", "cuda:", "cuda:x", "CUDA", " cpu", "", None, 0):
            with pytest.raises(ConfigError, match="device="):
                EngineConfig(device=device)  # type: ignore[arg-type]

    @pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
    @pytest.mark.parametrize(
        "setting",
        [{"eviction": "least-stale"}, {"eviction": "none"}],
        ids=str,
    )
    def test_what_only_the_host_can_run_is_refused_elsewhere(
        self, device: str, setting: dict[str, Any]
    ) -> None:
        how = {"device": device, "orchestration": "device"}
        assert EngineConfig(**how).host_only is None
        (name,) = setting
        assert name in str(EngineConfig(**setting).host_only)
        with pytest.raises(ConfigError, match=f"{name}=.*needs the host"):
            EngineConfig(**how, **setting)

    def test_every_predictor_and_policy_runs_wherever_experts_are_decided_about(self) -> None:
        for name in ("predictor", "policy"):
            for value in EngineConfig.CHOICES[name]:
                assert EngineConfig(orchestration="device", **{name: value}).host_only is None

    def test_the_host_may_decide_about_a_cuda_device(self) -> None:
        for setting in ({"orchestration": "host"}, {"policy": "speculate"}, {"eviction": "lfu"}):
            assert EngineConfig(device="cuda:1", **setting).device == "cuda:1"
        for draft in ("auto", "int8"):
            assert EngineConfig(device="cuda", orchestration="host", draft=draft).draft == draft

    def test_slots_are_divided_where_the_device_decides(self) -> None:
        for plan, kept in (
            ("equal", "equal"),
            ("trace.jsonl", "trace.jsonl"),
            (Path("a", "trace.jsonl"), "a/trace.jsonl"),
            ([4, 5], (4, 5)),
            (np.array([4, 5]), (4, 5)),
            (torch.tensor([4, 5]), (4, 5)),
            (list(np.array([4, 5])), (4, 5)),
        ):
            asked = EngineConfig(orchestration="device", slot_plan=plan)  # type: ignore[arg-type]
            assert asked.slot_plan == kept
            assert all(type(number) in (int, str) for number in asked.slot_plan)
            assert EngineConfig.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
        for other in ({"orchestration": "host"}, {"eviction": "lfu"}):
            with pytest.raises(ConfigError, match="shared by all layers"):
                EngineConfig(slot_plan=(4, 5), **other)

    @pytest.mark.parametrize(
        "plan",
        ["", (), [], (4, 0), (4, 1.5), (True, 4), ("8",), None, 7, np.array([8.0]), np.array(8)],
    )
    def test_what_is_no_slot_plan_is_refused(self, plan: Any) -> None:
        with pytest.raises(ConfigError, match="slot_plan"):
            EngineConfig(orchestration="device", slot_plan=plan)

    @pytest.mark.parametrize("name", ["lookahead_layers", "num_workers", "prefill_chunk"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, "2", None])
    def test_counts_are_whole_and_positive(self, name: str, value: Any) -> None:
        assert getattr(EngineConfig(**{name: 3}), name) == 3
        with pytest.raises(ConfigError, match=name):
            EngineConfig(**{name: value})

    def test_nobody_copies_on_a_million_threads(self) -> None:
        assert EngineConfig(num_workers=EngineConfig.MOST_WORKERS).num_workers == 1024
        with pytest.raises(ConfigError, match=r"num_workers=1025 must be .* from 1 to 1024"):
            EngineConfig(num_workers=1025)

    @pytest.mark.parametrize("value", [0, 0.5, 1])
    def test_confidence_is_a_share(self, value: float) -> None:
        assert EngineConfig(confidence=value).confidence == value

    @pytest.mark.parametrize("value", [-0.1, 1.01, 2, float("nan"), "0.5", None, True])
    def test_what_is_no_share_is_no_confidence(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"confidence=.*from 0 to 1"):
            EngineConfig(confidence=value)

    def test_what_executes_predictions_needs_a_predictor(self) -> None:
        with pytest.raises(ConfigError, match="predictor='none' makes none") as caught:
            EngineConfig(policy="speculate", predictor="none")
        assert "predictor='auto'" in str(caught.value.hint)
        assert EngineConfig(policy="speculate-when", predictor="none").policy == "speculate-when"

    def test_nothing_is_speculated_unless_asked_for(self) -> None:
        assert EngineConfig().policy == "exact"

    def test_nothing_is_drafted_unless_asked_for(self) -> None:
        config = EngineConfig()
        assert (config.draft, config.num_draft_tokens) == ("none", "auto")

    @pytest.mark.parametrize(
        ("given", "kept"), [("auto", "auto"), (0, 0), (4, 4), ("4", 4), (32, 32), ("0", 0)]
    )
    def test_draft_tokens_are_a_number_or_auto(self, given: Any, kept: Any) -> None:
        config = EngineConfig(draft="int4", num_draft_tokens=given)
        assert config.num_draft_tokens == kept
        assert type(config.num_draft_tokens) is type(kept)
        assert EngineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize("value", [-1, 33, "33", "-1", "some", "", 1.5, True, None])
    def test_other_numbers_of_draft_tokens_are_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"num_draft_tokens=.*'auto' or a whole number"):
            EngineConfig(draft="int4", num_draft_tokens=value)

    @pytest.mark.parametrize("value", [0, 4, "4"])
    def test_draft_tokens_need_a_draft(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="draft='none' has none") as caught:
            EngineConfig(num_draft_tokens=value)
        assert "draft='int4'" in str(caught.value.hint)

    @pytest.mark.parametrize(("given", "kept"), [("auto", "auto"), ("4096", 4096), (2, 2)])
    def test_context_is_a_number_or_auto(self, given: Any, kept: Any) -> None:
        assert EngineConfig(context=given).context == kept

    @pytest.mark.parametrize("value", [1, 0, -5, True, 2.5, "many", None, "9" * 5000])
    def test_other_contexts_are_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"context=.*'auto' or a whole number"):
            EngineConfig(context=value)

    @pytest.mark.parametrize("draft", ["auto", "int4", "int8"])
    @pytest.mark.parametrize("policy", ["speculate", "speculate-when"])
    def test_a_draft_is_verified_by_the_exact_model_only(self, draft: str, policy: str) -> None:
        with pytest.raises(ConfigError, match=f"policy='{policy}' is not exact") as caught:
            EngineConfig(draft=draft, policy=policy)
        assert "policy='exact'" in str(caught.value.hint)
        assert EngineConfig(policy=policy).draft == "none"

    @pytest.mark.parametrize("value", ["auto", "25%", "1GiB", 12345])
    def test_expert_memory_is_a_size_or_auto(self, value: Any) -> None:
        assert EngineConfig(expert_memory=value).expert_memory == value

    @pytest.mark.parametrize("value", ["some", 0, 0.5])
    def test_expert_memory_that_is_no_size_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="expert_memory"):
            EngineConfig(expert_memory=value)

    @pytest.mark.parametrize("value", [25, "25", " 1 ", 1023])
    @pytest.mark.parametrize("name", ["expert_memory", "host_memory"])
    def test_a_number_that_was_meant_in_other_units_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"{name}=.* bytes, because it has no unit") as caught:
            EngineConfig(**{name: value})
        assert f'"{str(value).strip()}%"' in str(caught.value.hint)
        assert f'"{str(value).strip()}GiB"' in str(caught.value.hint)

    def test_a_dictionary_goes_there_and_back(self) -> None:
        config = EngineConfig(model="m", expert_memory="10%", num_workers=3)
        values = json.loads(json.dumps(config.to_dict()))
        assert EngineConfig.from_dict(values) == config
        assert values["num_workers"] == 3

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match="'expert_mem'") as caught:
            EngineConfig.from_dict({"expert_mem": "1GiB"})
        assert "expert_memory" in str(caught.value.hint)

    def test_a_changed_copy_is_checked_too(self) -> None:
        config = EngineConfig()
        assert config.with_values(eviction="lru").eviction == "lru"
        assert config.eviction == "history"
        with pytest.raises(ConfigError):
            config.with_values(eviction="nonsense")


class TestSamplingConfig:
    @pytest.mark.parametrize(
        ("name", "good", "bad"),
        [
            ("max_new_tokens", [1, 9], [0, -1]),
            (
                "temperature",
                [0, 0.0, 1.5, 1.2e-38, 1e38],
                [-0.1, float("nan"), float("inf"), 5e-324, 1e-38, 1e300, 10**400],
            ),
            ("top_p", [1.0, 0.01, 5e-324], [0.0, 1.01, -1, float("nan")]),
            ("top_k", [0, 1, 10**30], [-1]),
            ("seed", [None, 0, -1, -(2**63), 2**64 - 1], [2**64, -(2**63) - 1, 10**30, 0.5]),
        ],
    )
    def test_limits(self, name: str, good: list[Any], bad: list[Any]) -> None:
        for value in good:
            assert getattr(SamplingConfig(**{name: value}), name) == value
        for value in bad:
            with pytest.raises(ConfigError, match=name):
                SamplingConfig(**{name: value})

    @pytest.mark.parametrize(
        ("given", "kept"), [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ())]
    )
    def test_stop_is_one_text_or_several(self, given: Any, kept: tuple[str, ...]) -> None:
        assert SamplingConfig(stop=given).stop == kept

    @pytest.mark.parametrize("stop", ["", ["a", ""], [1], None, 5, b"ab"])
    def test_stop_texts_are_not_empty(self, stop: Any) -> None:
        with pytest.raises(ConfigError, match="stop"):
            SamplingConfig(stop=stop)

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match="max_tokens") as caught:
            SamplingConfig.from_dict({"max_tokens": 5})
        assert "max_new_tokens" in str(caught.value.hint)

    def test_greedy_is_the_default(self) -> None:
        assert SamplingConfig().temperature == 0
