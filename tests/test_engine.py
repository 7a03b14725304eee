"""The engine generates what transformers would, stops when it should, and survives misuse."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

import zoo
from fakes import assert_settled, finish, least_memory, make_engine
from foreload import Engine
from foreload.config import EngineConfig
from foreload.decode.chunks import Chunk
from foreload.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ForeloadError,
    UnsupportedModelError,
)
from foreload.memory.arena import slot_bytes
from foreload.memory.disk import DiskBackend
from foreload.memory.host_arena import HostArena
from foreload.memory.throttle import ThrottledBackend
from foreload.model import device_path
from foreload.model.hf import load_model
from foreload.resolution import resolve
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from foreload.model.hf import LoadedModel
    from foreload.types import Prediction, RoutingEvent

    Open = Callable[..., Engine]

PROMPT = list(range(40, 52))
MESSAGES = [{"role": "user", "content": "the cat"}]
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def generate_eagerly(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Generate greedily with transformers, whole prompt in one forward, no end token."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)).long(),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, len(prompt) :].tolist()


def open_paths() -> set[str]:
    """Give the files this process has open, wherever in them it stands."""
    return {file.path for file in psutil.Process().open_files()}


def set_generation(folder: Path, **values: Any) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


class TestGenerating:
    @pytest.mark.parametrize("expert_memory", ["minimum", "50%", "100%"])
    def test_greedy_tokens_are_those_of_transformers(
        self, open_engine: Open, tiny_model: PreTrainedModel, expert_memory: str
    ) -> None:
        result = open_engine(expert_memory=expert_memory).generate(PROMPT, max_new_tokens=24)
        assert result.token_ids == generate_eagerly(tiny_model, PROMPT, 24)
        assert result.finish_reason == "length"

    def test_transformers_own_generate_streams_experts_too(
        self, open_engine: Open, tiny_model: PreTrainedModel
    ) -> None:
        engine = open_engine(expert_memory="25%")
        own = engine.generate(PROMPT, max_new_tokens=16).token_ids
        before = engine.metrics.snapshot()
        assert generate_eagerly(engine.model, PROMPT, 16) == own
        assert engine.metrics.since(before).bytes_moved > 0

    def test_text_prompts_are_tokenised_and_results_detokenised(
        self, open_engine: Open, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        engine = open_engine()
        text = "the cat sat"
        result = engine.generate(text, max_new_tokens=12)
        assert (
            result.token_ids
            == engine.generate(tokenizer(text)["input_ids"], max_new_tokens=12).token_ids
        )
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert result.stats.num_prompt_tokens == len(tokenizer(text)["input_ids"])

    @pytest.mark.parametrize("prefill_chunk", [1, 5, 12, 100])
    def test_the_prompt_is_read_in_chunks(self, open_engine: Open, prefill_chunk: int) -> None:
        engine = open_engine(prefill_chunk=prefill_chunk, predictor="none")
        engine.generate(PROMPT, max_new_tokens=1)
        assert engine.metrics.num_steps == -(-len(PROMPT) // prefill_chunk)

    def test_samples_follow_the_seed_and_not_the_memory(self, open_engine: Open) -> None:
        def draw(engine: Engine, seed: int) -> list[int]:
            return engine.generate(
                PROMPT, max_new_tokens=12, temperature=1.0, top_p=0.95, seed=seed
            ).token_ids

        large, small = open_engine(expert_memory="100%"), open_engine(expert_memory="minimum")
        assert draw(large, 1) == draw(large, 1) == draw(small, 1)
        assert draw(large, 1) != draw(large, 2)

    def test_the_prefill_computes_the_logits_of_the_last_token_only(
        self, open_engine: Open
    ) -> None:
        engine = open_engine()
        shapes: list[tuple[int, ...]] = []
        head = engine.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
        engine.generate(PROMPT, max_new_tokens=1)
        hook.remove()
        assert [shape[-2] for shape in shapes] == [1]


class TestStreaming:
    def test_chunks_add_up_to_the_result(self, open_engine: Open) -> None:
        engine = open_engine()
        chunks = list(engine.stream("the cat", max_new_tokens=10))
        result = engine.generate("the cat", max_new_tokens=10)
        assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert [chunk.finish_reason for chunk in chunks] == [None] * 10 + ["length"]
        assert [chunk.stats is None for chunk in chunks] == [True] * 10 + [False]
        assert all(isinstance(chunk, Chunk) for chunk in chunks)

    def test_tokens_come_one_by_one(self, open_engine: Open) -> None:
        engine = open_engine(predictor="none")
        stream = engine.stream(PROMPT, max_new_tokens=10)
        assert engine.metrics.num_steps == 0
        next(stream)
        assert engine.metrics.num_steps == 1
        next(stream)
        assert engine.metrics.num_steps == 2

    def test_a_stream_that_is_dropped_disturbs_nobody(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="minimum")
        wanted = engine.generate(PROMPT, max_new_tokens=8).token_ids
        for num_read in (0, 1, 3):
            stream = engine.stream(PROMPT[::-1], max_new_tokens=8)
            for _ in range(num_read):
                next(stream)
            stream.close()  # type: ignore[attr-defined]
            assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted

    def test_interleaved_streams_equal_separate_runs(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="25%", prefill_chunk=5)
        prompts = [PROMPT, PROMPT[::-1], [7, 8, 9]]
        wanted = [engine.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
        streams = [engine.stream(prompt, max_new_tokens=8) for prompt in prompts]
        found: list[list[int]] = [[], [], []]
        for _ in range(9):
            for tokens, stream in zip(found, streams, strict=True):
                tokens.extend(next(stream).token_ids)
        assert found == wanted

    @pytest.mark.parametrize(
        "settings",
        [
            {"expert_memory": "25%", "predictor": "lookahead"},
            {"expert_memory": "80%", "draft": "int4"},
        ],
        ids=str,
    )
    def test_threads_generate_side_by_side(
        self, open_engine: Open, settings: dict[str, Any]
    ) -> None:
        engine = open_engine(**settings)
        prompts = [PROMPT, PROMPT[::-1] * 2, [7, 8, 9]]
        wanted = [engine.generate(prompt, max_new_tokens=10).token_ids for prompt in prompts]
        found: dict[int, list[int]] = {}

        def work(place: int) -> None:
            found[place] = engine.generate(prompts[place], max_new_tokens=10).token_ids

        threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found.get(place) for place in range(3)] == wanted


class TestEnding:
    def test_the_end_token_ends_and_does_not_show(
        self, open_engine: Open, checkpoint_copy: Path
    ) -> None:
        tokens = open_engine().generate(PROMPT, max_new_tokens=12).token_ids
        end = tokens[5]
        first = tokens.index(end)
        set_generation(checkpoint_copy, eos_token_id=[end, 319])
        result = open_engine(checkpoint_copy).generate(PROMPT, max_new_tokens=12)
        assert result.finish_reason == "stop"
        assert result.token_ids == tokens[:first]

    def test_a_stop_text_ends_and_does_not_show(self, open_engine: Open) -> None:
        engine = open_engine()
        whole = engine.generate("the cat", max_new_tokens=16).text
        stop = whole[6:9]
        result = engine.generate("the cat", max_new_tokens=16, stop=[stop, "never"])
        assert result.finish_reason == "stop"
        assert result.text == whole[: whole.find(stop)]
        assert len(result.token_ids) <= 16
        shown = ""
        for chunk in engine.stream("the cat", max_new_tokens=16, stop=stop):
            shown += chunk.text
            assert whole.startswith(shown)
            assert stop not in shown

    def test_text_held_back_for_a_stop_that_never_came_shows_at_the_end(
        self, open_engine: Open
    ) -> None:
        engine = open_engine()
        whole = engine.generate("the cat", max_new_tokens=8).text
        result = engine.generate("the cat", max_new_tokens=8, stop=whole[-2:] + "\x00")
        assert (result.text, result.finish_reason) == (whole, "length")

    def test_cancel_ends_after_the_current_token(self, open_engine: Open) -> None:
        engine = open_engine()
        wanted = engine.generate(PROMPT, max_new_tokens=10).token_ids
        chunks = []
        for chunk in engine.stream(PROMPT, max_new_tokens=10):
            chunks.append(chunk)
            if len(chunks) == 3:
                engine.cancel()
        assert chunks[-1].finish_reason == "cancelled"
        assert chunks[-1].stats is not None
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert len(tokens) <= 4
        assert tokens == wanted[: len(tokens)]
        assert engine.generate(PROMPT, max_new_tokens=10).token_ids == wanted

    def test_cancel_ends_every_stream_there_is_and_none_that_comes(self, open_engine: Open) -> None:
        engine = open_engine()
        wanted = engine.generate(PROMPT, max_new_tokens=10).token_ids
        streams = [engine.stream(PROMPT, max_new_tokens=10) for _ in range(3)]
        for stream in streams[:2]:
            next(stream)
        engine.cancel()
        later = engine.stream(PROMPT, max_new_tokens=10)
        ends = [list(stream)[-1].finish_reason for stream in streams]
        assert ends == ["cancelled"] * 3
        assert [token for chunk in later for token in chunk.token_ids] == wanted

    def test_cancel_from_another_thread_ends_a_long_generation(self, open_engine: Open) -> None:
        engine = open_engine()
        timer = threading.Timer(0.2, engine.cancel)
        timer.start()
        result = finish(lambda: engine.generate(PROMPT, max_new_tokens=480), within_s=60)
        timer.join()
        assert result.finish_reason == "cancelled"
        assert len(result.token_ids) < 480

    def test_cancel_ends_a_long_prefill_too(self, open_engine: Open) -> None:
        engine = open_engine(prefill_chunk=1)
        engine.runtime.on_routing = lambda event, wanted: event.step == 3 and engine.cancel()
        result = engine.generate(PROMPT, max_new_tokens=5)
        assert result.finish_reason == "cancelled"
        assert result.token_ids == []
        assert engine.metrics.num_steps < 6
        engine.runtime.on_routing = None
        assert engine.generate(PROMPT, max_new_tokens=5).finish_reason == "length"

    def test_the_context_is_a_limit(self, open_engine: Open) -> None:
        engine = open_engine(predictor="none")
        assert engine.spec.model_type == "qwen3_moe"
        result = engine.generate([5] * 510, max_new_tokens=50)
        assert (len(result.token_ids), result.finish_reason) == (2, "context")
        with pytest.raises(ConfigError, match="512 tokens, the context is 512") as caught:
            engine.stream([5] * 512)
        assert caught.value.hint is not None
        assert "built for 512 tokens" in caught.value.hint

    def test_the_context_can_be_set(self, open_engine: Open) -> None:
        engine = open_engine(predictor="none", context="20")
        assert engine.config.context == engine.max_positions == 20
        result = engine.generate([5] * 17, max_new_tokens=50)
        assert (len(result.token_ids), result.finish_reason) == (3, "context")
        with pytest.raises(ConfigError, match="the context is 20") as caught:
            engine.stream([5] * 20)
        assert caught.value.hint is not None
        assert "larger context" in caught.value.hint


class TestPrompts:
    @pytest.mark.parametrize("prompt", [[0, 320], [-1], [5, 10**9]])
    def test_tokens_outside_the_vocabulary_are_refused(
        self, open_engine: Open, prompt: list[int]
    ) -> None:
        with pytest.raises(ConfigError, match="vocabulary of 320"):
            open_engine().stream(prompt)

    @pytest.mark.parametrize("prompt", ["", []])
    def test_an_empty_prompt_is_refused(self, open_engine: Open, prompt: Any) -> None:
        with pytest.raises(ConfigError, match="empty"):
            open_engine().stream(prompt)

    def test_settings_are_checked_before_anything_runs(self, open_engine: Open) -> None:
        engine = open_engine()
        with pytest.raises(ConfigError, match="max_tokens"):
            engine.stream(PROMPT, max_tokens=5)
        with pytest.raises(ConfigError, match="temperature"):
            engine.stream(PROMPT, temperature=-1)
        assert engine.metrics.num_steps == 0

    def test_messages_need_a_chat_template(self, open_engine: Open) -> None:
        with pytest.raises(ConfigError, match="chat template") as caught:
            open_engine().stream(MESSAGES)
        assert "plain text" in str(caught.value.hint)

    def test_messages_are_written_by_the_template(
        self, open_engine: Open, checkpoint_copy: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (checkpoint_copy / "chat_template.jinja").write_text(TEMPLATE)
        engine = open_engine(checkpoint_copy)
        written = "<bos>user: the cat<bos>assistant: "
        wanted = tokenizer(written, add_special_tokens=False)["input_ids"]
        result = engine.generate(MESSAGES, max_new_tokens=6)
        assert result.stats.num_prompt_tokens == len(wanted)
        assert result.token_ids == engine.generate(wanted, max_new_tokens=6).token_ids

    def test_without_a_tokenizer_only_tokens_will_do(
        self, open_engine: Open, checkpoint_copy: Path
    ) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (checkpoint_copy / name).unlink()
        engine = open_engine(checkpoint_copy)
        assert engine.tokenizer is None
        result = engine.generate(PROMPT, max_new_tokens=3)
        assert (result.text, len(result.token_ids)) == ("", 3)
        with pytest.raises(ConfigError, match="no tokenizer"):
            engine.stream("the cat")


class TestStatistics:
    def test_a_request_counts_its_own_work_only(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="25%")
        engine.generate(PROMPT, max_new_tokens=3)
        before = engine.metrics.snapshot()
        stats = engine.generate(PROMPT, max_new_tokens=8).stats
        request = engine.metrics.since(before)
        assert (stats.num_prompt_tokens, stats.num_output_tokens) == (len(PROMPT), 8)
        assert stats.bytes_moved == request.bytes_moved > 0
        assert stats.hit_rate == request.hit_rate
        assert stats.wasted_bytes == request.wasted_bytes
        assert stats.recall_at_n == request.recall_at_n
        assert 0 < stats.ttft_s < stats.e2e_s
        assert stats.tpot_s == pytest.approx((stats.e2e_s - stats.ttft_s) / 7)
        assert stats.stall_fraction == pytest.approx(stats.stall_s / stats.e2e_s)
        assert stats.expert_memory_bytes == engine.expert_memory_bytes

    def test_one_token_has_no_time_per_token(self, open_engine: Open) -> None:
        stats = open_engine().generate(PROMPT, max_new_tokens=1).stats
        assert stats.tpot_s is None
        assert stats.bytes_per_token is None

    def test_all_experts_resident_move_nothing_twice(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="100%", predictor="none")
        for prompt in (list(range(3, 300)), PROMPT):
            engine.generate(prompt, max_new_tokens=8)
        assert engine.generate(PROMPT, max_new_tokens=8).stats.hit_rate == 1.0
        num_experts = engine.spec.num_moe_layers * engine.spec.num_experts
        assert engine.metrics.num_misses <= num_experts

    def test_the_engines_totals_are_its_counters(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="25%")
        engine.generate(PROMPT, max_new_tokens=4)
        stats = engine.stats
        json.dumps(stats)
        assert stats["num_steps"] == engine.metrics.num_steps == 4
        assert stats["bytes_moved"] == engine.metrics.bytes_moved
        assert stats["hit_rate"] == engine.metrics.hit_rate

    def test_the_timeline_shows_compute_and_disk(self, open_engine: Open) -> None:
        engine = open_engine(
            expert_memory="25%",
            # So slow that the model waits, however busy the machine.
            backend=lambda arena: ThrottledBackend(DiskBackend(arena), 1e6),
        )
        engine.timeline.is_on = True
        engine.generate(PROMPT, max_new_tokens=4)
        assert {"compute", "disk", "stall"} == {span.lane for span in engine.timeline.spans}
        assert all(span.start_s <= span.end_s for span in engine.timeline.spans)


class TestClosing:
    def test_a_closed_engine_says_so(self, open_engine: Open) -> None:
        engine = open_engine()
        engine.close()
        for use in (
            lambda: engine.generate(PROMPT),
            lambda: engine.stream(PROMPT),
            lambda: engine.model(torch.tensor([PROMPT])),
        ):
            with pytest.raises(ForeloadError, match="closed"):
                use()

    def test_closing_twice_is_closing_once(self, open_engine: Open) -> None:
        engine = open_engine()
        engine.generate(PROMPT, max_new_tokens=2)
        finish(engine.close)
        finish(engine.close)

    def test_a_with_block_closes_also_after_an_error(self, tiny_checkpoint: Path) -> None:
        before = set(threading.enumerate())
        files = open_paths()

        def use() -> None:
            with make_engine(tiny_checkpoint) as engine:
                engine.generate(PROMPT, max_new_tokens=2)
                assert set(threading.enumerate()) > before
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            use()
        assert set(threading.enumerate()) == before
        assert open_paths() == files

    def test_a_stream_of_a_closed_engine_ends_in_an_error(self, open_engine: Open) -> None:
        engine = open_engine()
        stream = engine.stream(PROMPT, max_new_tokens=9)
        next(stream)
        engine.close()
        with pytest.raises(ForeloadError, match="closed"):
            finish(lambda: list(stream))

    def test_close_during_a_generation_on_another_thread_hangs_nobody(
        self, open_engine: Open
    ) -> None:
        engine = open_engine(expert_memory="minimum")
        timer = threading.Timer(0.1, engine.close)
        timer.start()
        with pytest.raises(ForeloadError, match="closed"):
            finish(lambda: engine.generate(PROMPT, max_new_tokens=490))
        timer.join(30)
        assert not timer.is_alive()

    def test_what_breaks_off_because_of_closing_says_so(self, open_engine: Open) -> None:
        for settings in ({}, {"draft": "int4", "expert_memory": "80%"}):
            engine = open_engine(**settings)
            stream = engine.stream(PROMPT, max_new_tokens=20)
            next(stream)
            engine.close()
            with pytest.raises(ForeloadError, match="closed: the text was broken off"):
                list(stream)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"draft": "int4"}, {"device": "cpu", "orchestration": "device", "draft": "int8"}],
        ids=str,
    )
    def test_an_engine_that_is_dropped_is_closed_with_a_warning(
        self, tiny_checkpoint: Path, settings: dict[str, Any]
    ) -> None:
        before, files = set(threading.enumerate()), open_paths()
        engine = make_engine(tiny_checkpoint, expert_memory="80%", **settings)
        engine.generate(PROMPT, max_new_tokens=4)
        dropped, model = weakref.ref(engine), engine.model
        # When Python ends there is no thread to close on, and the system takes all.
        assert engine._dropped is not None
        assert not engine._dropped.atexit
        del engine
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gc.collect()
        assert dropped() is None
        # Whoever has the model can go on.
        model(torch.tensor([PROMPT]))
        del model
        with pytest.warns(ResourceWarning, match=r"dropped without close\(\)"):
            gc.collect()
        for thread in set(threading.enumerate()) - before:
            thread.join(30)
        assert set(threading.enumerate()) == before
        assert open_paths() == files

    def test_an_engine_that_was_closed_is_dropped_in_silence(self, tiny_checkpoint: Path) -> None:
        engine = make_engine(tiny_checkpoint)
        engine.close()
        model = weakref.ref(engine.model)
        del engine
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gc.collect()
        assert model() is None


class TestMovedModel:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_model_that_was_cast_is_refused(self, open_engine: Open, dtype: torch.dtype) -> None:
        engine = open_engine()
        wanted = engine.generate(PROMPT, max_new_tokens=4).token_ids
        engine.model.to(dtype)
        with pytest.raises(ConfigError, match=f"float32 on cpu .* {dtype} on cpu now") as caught:
            engine.stream(PROMPT)
        assert "dtype" in str(caught.value.hint)
        engine.model.to(torch.float32)
        assert len(engine.generate(PROMPT, max_new_tokens=4).token_ids) == len(wanted)


class Flawed:
    """Predicts nothing, and raises when it is told to."""

    name = "flawed"

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        if self.error is not None and event.layer == 2:
            raise self.error
        return []


class TestErrors:
    @pytest.mark.parametrize("error", [RuntimeError("flaw"), KeyboardInterrupt()], ids=repr)
    def test_after_an_exception_the_engine_goes_on(
        self, open_engine: Open, error: BaseException
    ) -> None:
        flawed = Flawed()
        engine = open_engine(expert_memory="minimum", predictor=lambda spec: flawed)
        wanted = engine.generate(PROMPT, max_new_tokens=6).token_ids
        flawed.error = error
        for _ in range(3):
            with pytest.raises(type(error)):
                engine.generate(PROMPT, max_new_tokens=6)
        flawed.error = None
        assert engine.generate(PROMPT, max_new_tokens=6).token_ids == wanted
        assert_settled(engine.tiers)


class TestPolicies:
    """What the policies execute is tested in tests/equivalence/test_policies.py."""

    def executed(self, engine: Engine) -> list[tuple[int, bool]]:
        """Note, per layer visit, the step and whether something else was executed."""
        seen: list[tuple[int, bool]] = []
        engine.runtime.on_routing = lambda event, wanted: seen.append(
            (event.step, event.executed is not None)
        )
        return seen

    @pytest.mark.parametrize(("num_prompt", "chunk"), [(1, 8), (9, 8), (9, 4)])
    def test_no_token_of_a_prompt_is_speculated(
        self, open_engine: Open, num_prompt: int, chunk: int
    ) -> None:
        engine = open_engine(policy="speculate", prefill_chunk=chunk)
        seen = self.executed(engine)
        engine.generate(PROMPT[:num_prompt], max_new_tokens=4)
        num_prefills = -(-num_prompt // chunk)
        assert {step for step, is_other in seen if is_other} == {
            num_prefills + step for step in range(3)
        }

    def test_a_request_tells_what_was_speculated_while_decoding(self, open_engine: Open) -> None:
        engine = open_engine(
            policy="speculate-when", confidence=0, predictor="none", expert_memory="25%"
        )
        stats = engine.generate(PROMPT, max_new_tokens=8).stats
        assert 0 < stats.speculated_fraction < 1
        assert 0 < engine.stats["speculated_fraction"] < stats.speculated_fraction

    def test_the_exact_policy_speculates_nothing(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="25%")
        seen = self.executed(engine)
        assert engine.generate(PROMPT, max_new_tokens=8).stats.speculated_fraction == 0
        assert not any(is_other for _, is_other in seen)

    def test_settings_name_the_policy(self, open_engine: Open) -> None:
        engine = open_engine(policy="speculate-when", confidence=0.7)
        assert engine.runtime.policy == SpeculateWhen(0.7)
        assert engine.config.to_dict()["policy"] == "speculate-when"
        assert engine.config.to_dict()["confidence"] == 0.7
        assert open_engine(policy="speculate").runtime.policy == Speculate()
        assert open_engine().runtime.policy == Exact()

    def test_routers_that_cannot_be_asked_are_not_speculated(self, tmp_path: Path) -> None:
        checkpoint = zoo.save_tiny("zaya", tmp_path)
        threads = threading.active_count()
        with pytest.raises(UnsupportedModelError, match="'speculate' cannot run Zaya") as caught:
            make_engine(checkpoint.path, policy="speculate")
        assert "policy='exact'" in str(caught.value.hint)
        assert threading.active_count() == threads

    def test_only_layers_that_cannot_be_asked_stay_exact(self, tmp_path: Path) -> None:
        checkpoint = zoo.save_tiny("deepseek_v4", tmp_path)
        with make_engine(checkpoint.path, policy="speculate") as engine:
            whole = {site.layer for site in engine._loaded.sites[1:] if site.is_routing_whole}
            speculated = set()
            engine.runtime.on_routing = lambda event, wanted: (
                speculated.add(event.layer) if event.executed is not None else None
            )
            engine.generate(checkpoint.input_ids[0].tolist(), max_new_tokens=3)
        assert speculated == whole

    def test_a_closed_engine_leaves_no_hooks(self, open_engine: Open) -> None:
        engine = open_engine(policy="speculate-when")
        assert any(module._forward_hooks for module in engine.model.modules())
        engine.close()
        for module in engine.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


class TestOpening:
    @pytest.mark.parametrize("orchestration", ["host", "device"])
    @pytest.mark.parametrize("draft", ["none", "int4"])
    def test_a_closed_engine_goes_with_its_last_reference(
        self, tiny_checkpoint: Path, tmp_path: Path, orchestration: str, draft: str
    ) -> None:
        given = {"expert_memory": "80%", "device": "cpu", "cache_dir": tmp_path}
        engine = Engine.from_pretrained(
            tiny_checkpoint, orchestration=orchestration, draft=draft, **given
        )
        engine.generate(PROMPT, max_new_tokens=6)
        engine.close()
        # What refers to itself in a circle would keep a device's memory until it is collected.
        held = [weakref.ref(engine), weakref.ref(engine.model)]
        gc.disable()
        try:
            del engine
            assert [reference() for reference in held] == [None, None]
        finally:
            gc.enable()

    def test_a_device_without_memory_left_says_what_to_change(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        released: list[HostArena] = []
        own_release = HostArena.release

        def release(self: HostArena) -> None:
            released.append(self)
            own_release(self)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

        monkeypatch.setattr(HostArena, "release", release)
        monkeypatch.setattr(device_path, "ExpertStream", refuse)
        with pytest.raises(CapacityError, match="ran out of memory") as caught:
            Engine.from_pretrained(
                tiny_checkpoint, expert_memory="50%", device="cpu", orchestration="device"
            )
        assert caught.value.hint == "set expert_memory to less"
        assert released

    def test_two_engines_live_side_by_side(
        self, open_engine: Open, tiny_model: PreTrainedModel
    ) -> None:
        one, two = open_engine(expert_memory="minimum"), open_engine(predictor="none")
        streams = [engine.stream(PROMPT, max_new_tokens=8) for engine in (one, two)]
        tokens: list[list[int]] = [[], []]
        for _ in range(9):
            for found, stream in zip(tokens, streams, strict=True):
                found.extend(next(stream).token_ids)
        assert tokens[0] == tokens[1] == generate_eagerly(tiny_model, PROMPT, 8)
        one.close()
        assert two.generate(PROMPT, max_new_tokens=8).token_ids == tokens[0]

    def test_from_pretrained_resolves_every_setting(self, tiny_checkpoint: Path) -> None:
        progress: list[tuple[int, int]] = []
        with Engine.from_pretrained(
            tiny_checkpoint,
            expert_memory="25%",
            progress=lambda done, whole: progress.append((done, whole)),
        ) as engine:
            assert engine.config.device == "cpu"
            assert engine.config.dtype == "float32"
            assert engine.config.expert_memory == engine.expert_memory_bytes
            assert engine.tokenizer is not None
        assert progress[-1][0] == progress[-1][1] > 0

    def test_unknown_settings_are_refused_before_loading(self) -> None:
        with pytest.raises(ConfigError, match="expert_mem"):
            Engine.from_pretrained("no/such/folder/at/all", expert_mem="25%")

    def test_a_folder_that_is_not_there_is_a_checkpoint_error(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError):
            Engine.from_pretrained(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


class TestMemory:
    def test_percentages_are_of_all_experts(self, loaded: LoadedModel) -> None:
        size = max(slot_bytes(plan) for layer in loaded.plans for plan in layer)
        for percent, slots in [("25%", 16), ("50%", 32), ("100%", 64), ("400%", 64)]:
            config = resolve(EngineConfig(expert_memory=percent), loaded)
            assert config.expert_memory == slots * size

    def test_the_budget_is_a_ceiling(self, loaded: LoadedModel) -> None:
        size = max(slot_bytes(plan) for layer in loaded.plans for plan in layer)
        config = resolve(EngineConfig(expert_memory=10 * size - 1), loaded)
        assert config.expert_memory == 9 * size

    def test_auto_takes_everything_that_fits(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = max(slot_bytes(plan) for layer in loaded.plans for plan in layer)
        assert resolve(EngineConfig(), loaded).expert_memory == 64 * size
        free = (1 << 30) + 20 * size + 5
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: type("Memory", (), {"available": free})
        )
        assert resolve(EngineConfig(), loaded).expert_memory == 20 * size

    def test_too_little_is_refused_with_the_least_that_would_do(self, loaded: LoadedModel) -> None:
        least = least_memory(loaded.plans, loaded.spec.top_k)
        assert resolve(EngineConfig(expert_memory=least), loaded).expert_memory == least
        with pytest.raises(CapacityError, match="below one layer's needs") as caught:
            resolve(EngineConfig(expert_memory=least - 1), loaded)
        assert caught.value.needed_bytes == least
        assert caught.value.setting == "expert_memory"

    def test_more_than_the_machine_has_is_refused(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})
        )
        with pytest.raises(CapacityError, match="less free memory"):
            resolve(EngineConfig(expert_memory="100%"), loaded)

    def test_the_arena_is_no_larger_than_asked(self, open_engine: Open) -> None:
        engine = open_engine(expert_memory="25%")
        assert engine.expert_memory_bytes <= 0.25 * 64 * engine.tiers._arena.slot_bytes
        assert engine.tiers.num_slots == 16


def test_one_model_in_many_files_is_one_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert len(list(tiny_checkpoint.glob("*.safetensors"))) >= 3
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    assert load_model(moved).spec == load_model(tiny_checkpoint).spec
