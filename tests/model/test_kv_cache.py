"""The growing cache holds what transformers' own would, bit for bit, and grows rarely."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import zoo
from foreload.model.kv_cache import (
    _GrowingLayer,
    can_be_static,
    can_rewind,
    clear_static,
    make_kv_cache,
    make_static_cache,
    pass_cache,
    rewind,
    rewind_static,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


@pytest.fixture(scope="module", params=zoo.SEVEN_FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built = zoo.build_family(request.param)
    built.set_experts_implementation("eager")
    return built


def assert_equal(ours: DynamicCache, theirs: DynamicCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(own.keys, other.keys)
        assert torch.equal(own.values, other.values)


def run(model: PreTrainedModel, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **pass_cache(model, cache), use_cache=True).logits


def both(model: PreTrainedModel) -> tuple[DynamicCache, DynamicCache]:
    return make_kv_cache(model), DynamicCache(config=model.config)


def test_prefill_and_decode_are_equal(model: PreTrainedModel) -> None:
    ours, theirs = both(model)
    for size in (5, 1, 1, 20, 1, 3):  # past the sliding window of those that have one
        tokens = zoo.prompt(size) + size
        assert torch.equal(run(model, ours, tokens), run(model, theirs, tokens))
        assert_equal(ours, theirs)


def test_cropping_forgets_the_last_tokens(model: PreTrainedModel) -> None:
    ours, theirs = both(model)
    for cache in (ours, theirs):
        run(model, cache, zoo.prompt(9))
        cache.crop(-4)
    assert_equal(ours, theirs)
    tokens = zoo.prompt(3) + 40
    assert torch.equal(run(model, ours, tokens), run(model, theirs, tokens))
    assert_equal(ours, theirs)
    fresh = make_kv_cache(model)
    run(model, fresh, zoo.prompt(9)[:, :5])
    assert torch.allclose(run(model, fresh, tokens), run_again(model, tokens), atol=1e-4)


def run_again(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Give the logits of `tokens` after five others, without any cropping."""
    both_parts = torch.cat([zoo.prompt(9)[:, :5], tokens], -1)
    with torch.no_grad():
        return model(input_ids=both_parts, use_cache=False).logits[:, 5:]


def test_batches_are_reordered_repeated_and_selected(model: PreTrainedModel) -> None:
    ours, theirs = both(model)
    batch = torch.cat([zoo.prompt(6), zoo.prompt(6) + 1, zoo.prompt(6) + 2])
    for cache in (ours, theirs):
        run(model, cache, batch)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert_equal(ours, theirs)
    for step in range(2):
        tokens = batch[:, :1] + step
        assert torch.equal(run(model, ours, tokens), run(model, theirs, tokens))
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([1, 2]))
        cache.batch_repeat_interleave(2)
    tokens = torch.cat([batch[:2, :1]] * 2)
    assert torch.equal(run(model, ours, tokens), run(model, theirs, tokens))
    assert_equal(ours, theirs)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="transformers 5.17 keeps the length of a dynamic cache that it resets",
)
def test_a_reset_cache_starts_anew(model: PreTrainedModel) -> None:
    ours, theirs = both(model)
    for cache in (ours, theirs):
        run(model, cache, zoo.prompt(7))
        cache.reset()
        run(model, cache, zoo.prompt(3) + 9)
    assert_equal(ours, theirs)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 200)),
        st.tuples(st.just("crop"), st.integers(0, 150)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("select"), st.permutations([0, 1])),
        st.tuples(st.just("copy"), st.none()),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=10,
)


@settings(max_examples=60)
@given(OPERATIONS)
def test_any_sequence_of_operations_agrees(operations: list[tuple[str, Any]]) -> None:
    ours, theirs = _GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for name, argument in operations:
        if name == "copy":
            ours = copy.deepcopy(ours)
            continue
        states = [torch.rand(2, 3, argument if name == "update" else 1, 4, generator=generator)]
        states.append(torch.rand(2, 3, states[0].shape[-2], 2, generator=generator))
        for layer in (ours, theirs):
            if name == "update":
                layer.update(*states)
            elif name == "crop":
                layer.crop(-min(argument, layer.get_seq_length()))
            elif name == "reset":
                layer.reset()
            elif layer.is_initialized:
                method = layer.reorder_cache if name == "reorder" else layer.batch_select_indices
                method(torch.tensor(argument))
        length = theirs.get_seq_length()
        assert ours.get_seq_length() == length
        if length:
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_a_thousand_tokens_take_a_few_buffers() -> None:
    layer = _GrowingLayer()
    buffers = set()
    for step in range(1000):
        keys, _ = layer.update(torch.full((1, 1, 1, 4), float(step)), torch.zeros(1, 1, 1, 4))
        buffers.add(keys.data_ptr())
    assert len(buffers) <= 4
    assert keys[0, 0, :, 0].tolist() == list(range(1000))


def test_no_room_is_kept_beyond_the_most_tokens() -> None:
    for first, most, room in ((3, 40, 40), (300, 500, 500), (100, 150, 150), (3, 1000, 600)):
        layer = _GrowingLayer(most)
        for size in (first, *[1] * 320):
            if layer.get_seq_length() + size > most:
                break
            layer.update(torch.zeros(1, 1, size, 4), torch.zeros(1, 1, size, 4))
        assert layer._key_buffer is not None
        assert layer._key_buffer.shape[-2] <= most
        assert layer._key_buffer.shape[-2] <= max(room, 512)
    beyond, _ = layer.update(torch.zeros(1, 1, 2000, 4), torch.zeros(1, 1, 2000, 4))
    assert beyond.shape[-2] > most, "what is there is never cut off"
    buffers = set()
    for _ in range(300):
        keys, _ = layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        buffers.add(keys.data_ptr())
    assert len(buffers) < 4, "nor copied for every token"


def test_low_precision_is_kept() -> None:
    layer = _GrowingLayer()
    ones = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    assert layer.update(ones, ones)[0].dtype == torch.bfloat16


def test_sliding_windows_stay_bounded() -> None:
    gpt_oss = zoo.build_family("gpt_oss")
    cache = make_kv_cache(gpt_oss)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert set(kinds) == {"_GrowingLayer", "_WindowLayer"}
    run(gpt_oss, cache, zoo.prompt(40))
    window = gpt_oss.config.sliding_window
    assert [layer.keys.shape[-2] < window for layer in cache.layers] == [
        kind == "_WindowLayer" for kind in kinds
    ]


def test_a_model_with_a_cache_class_of_its_own_gets_that() -> None:
    minimax = zoo.build_tiny("minimax").model
    ours = make_kv_cache(minimax)
    assert type(ours).__name__ == "MiniMaxCache"
    with torch.no_grad():
        first = minimax(input_ids=zoo.prompt(9)[:, :5], **pass_cache(minimax, ours), use_cache=True)
        second = minimax(
            input_ids=zoo.prompt(9)[:, 5:], **pass_cache(minimax, ours), use_cache=True
        )
        whole = minimax(input_ids=zoo.prompt(9), use_cache=True).last_hidden_state
    parts = [first.last_hidden_state, second.last_hidden_state]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_a_cache_filled_in_inference_mode_can_be_used_outside() -> None:
    layer = _GrowingLayer()
    with torch.inference_mode():
        layer.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    with torch.no_grad():
        keys, _ = layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert keys[0, 0, :, 0].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_rewinding_forgets_the_last_tokens_past_a_sliding_window_too(
    model: PreTrainedModel,
) -> None:
    tokens = zoo.prompt(40)
    cache = make_kv_cache(model)
    cache.activate_past_recording()
    run(model, cache, tokens[:, :20])
    rewind(cache, 0)
    for start in range(20, 32, 4):
        run(model, cache, tokens[:, start : start + 4])
        # Whatever came is forgotten, and what comes in its place is as if it had never been.
        run(model, cache, tokens[:, :3] + 50)
        rewind(cache, 4)
        assert cache.get_seq_length() == start + 3
        run(model, cache, tokens[:, start + 3 : start + 4])
        rewind(cache, 0)
    with torch.no_grad():
        whole = model(input_ids=tokens[:, :35], use_cache=False).logits[:, 32:]
    assert torch.allclose(run(model, cache, tokens[:, 32:35]), whole, atol=1e-4)


def test_rewinding_nothing_changes_nothing(model: PreTrainedModel) -> None:
    cache = make_kv_cache(model)
    cache.activate_past_recording()
    run(model, cache, zoo.prompt(9))
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    rewind(cache, 0)
    assert cache.get_seq_length() == 9
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_attention_can_go_back(model: PreTrainedModel) -> None:
    assert can_rewind(model)


@pytest.mark.parametrize("arch", ["qwen3_next", "jamba", "granitemoehybrid", "minimax"])
def test_recurrent_states_cannot_go_back(arch: str) -> None:
    built = zoo.build_tiny(arch)
    built.set_experts_implementation("eager")
    assert not can_rewind(built)


def test_a_past_of_bounded_length_can_go_back() -> None:
    built = zoo.build_tiny("lfm2_moe")  # short convolutions beside attention
    built.set_experts_implementation("eager")
    assert can_rewind(built)


def test_trying_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    state = torch.get_rng_state()
    before = run(model, make_kv_cache(model), zoo.prompt(9))
    can_rewind(model)
    assert torch.equal(run(model, make_kv_cache(model), zoo.prompt(9)), before)
    assert torch.equal(torch.get_rng_state(), state)


class TestStatic:
    def test_it_gives_what_the_growing_one_gives(self, model: PreTrainedModel) -> None:
        """Past the sliding window of those that have one; sums over more places round otherwise."""
        assert can_be_static(model)
        ours, theirs = make_static_cache(model, 64), make_kv_cache(model)
        for _ in range(2):
            for size in (5, 1, 1, 20, 1, 3):
                tokens = zoo.prompt(size) + size
                with torch.inference_mode():
                    found = model(
                        input_ids=tokens, **pass_cache(model, ours), use_cache=True
                    ).logits
                    wanted = model(
                        input_ids=tokens, **pass_cache(model, theirs), use_cache=True
                    ).logits
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            with torch.inference_mode():
                clear_static(ours)
            theirs = make_kv_cache(model)

    def test_its_buffers_stay_where_they_are(self, model: PreTrainedModel) -> None:
        cache = make_static_cache(model, 64)
        with torch.inference_mode():
            model(input_ids=zoo.prompt(5), **pass_cache(model, cache), use_cache=True)
            before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
            model(input_ids=zoo.prompt(30), **pass_cache(model, cache), use_cache=True)
            rewind_static(cache, 20)
            assert {int(layer.cumulative_length) for layer in cache.layers} == {15}
            clear_static(cache)
        after = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        assert before == after

    @pytest.mark.parametrize("arch", ["jamba", "qwen3_next", "lfm2_moe"])
    def test_states_that_are_no_keys_and_values_have_none(self, arch: str) -> None:
        built = zoo.build_tiny(arch)
        assert make_static_cache(built, 64) is None
        assert not can_be_static(built)


@pytest.mark.parametrize("ask", [can_rewind, can_be_static])
def test_a_shortage_of_memory_is_no_answer(
    ask: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = zoo.build_family("qwen3_moe")
    forward, calls = built.forward, []

    def run_out(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        # In the second of the two texts that are compared.
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    names = inspect.signature(forward)
    run_out.__signature__ = names  # type: ignore[attr-defined]
    monkeypatch.setattr(built, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        ask(built)
