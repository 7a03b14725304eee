"""`foreload evaluate` and what it stands on: exact costs nothing, and what is lost is counted."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes import assert_settled
from foreload import ConfigError, Engine, ShapeError
from foreload.evaluate import (
    EvaluationReport,
    Interval,
    bootstrap_interval,
    compare_logits,
    evaluate,
    prefill_exactly,
)
from foreload.schedule.policy import Exact, Speculate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from foreload.types import RoutingEvent

TOKENS = [(7 * i * i + 3 * i) % 250 for i in range(120)]
SPECULATE = {"policy": "speculate", "predictor": "lookahead"}


@pytest.fixture
def open_on(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Open engines on the checkpoint; at the end they must have settled."""
    engines: list[Engine] = []

    def open_one(**settings: Any) -> Engine:
        settings = {"expert_memory": "50%", "cache_dir": tmp_path, **settings}
        engines.append(Engine.from_pretrained(checkpoint, **settings))
        return engines[-1]

    yield open_one
    for engine in engines:
        assert_settled(engine.tiers)
        engine.close()


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))


def test_equal_logits_have_no_divergence_at_all() -> None:
    logits = random_logits(0)
    quality = compare_logits(logits, logits.clone(), torch.arange(5))
    assert quality.kl.tolist() == [0.0] * 5
    assert torch.equal(quality.nll, quality.nll_exact)
    assert quality.agrees.all()


def test_divergence_and_likelihood_are_torchs() -> None:
    exact, other, next_ids = random_logits(0), random_logits(1), torch.tensor([0, 3, 10, 2, 5])
    quality = compare_logits(exact, other, next_ids)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (exact, other))
    assert torch.allclose(quality.kl, torch.distributions.kl_divergence(p, q))
    assert torch.allclose(quality.nll_exact, -p.log_prob(next_ids))
    assert torch.allclose(quality.nll, -q.log_prob(next_ids))
    assert quality.agrees.tolist() == (exact.argmax(-1) == other.argmax(-1)).tolist()


def test_tokens_that_are_ruled_out_do_no_harm() -> None:
    exact, other = random_logits(0), random_logits(1)
    exact[:, 4] = other[:, 4] = -torch.inf
    quality = compare_logits(exact, other, torch.zeros(5, dtype=torch.long))
    assert quality.kl.isfinite().all()
    assert (quality.kl > 0).all()


def test_logits_of_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="do not agree"):
        compare_logits(random_logits(0), random_logits(0)[:4], torch.arange(5))
    with pytest.raises(ShapeError, match="do not agree"):
        compare_logits(random_logits(0), random_logits(0), torch.arange(4))


def test_an_interval_is_as_wide_as_the_central_limit_says() -> None:
    values = np.random.default_rng(3).normal(10, 2, size=400)
    interval = bootstrap_interval(values.tolist(), range(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.value - interval.low == pytest.approx(half, rel=0.1)
    assert interval.high - interval.value == pytest.approx(half, rel=0.1)
    assert bootstrap_interval(values.tolist(), range(400)) == interval
    assert bootstrap_interval(values.tolist(), range(400), seed=1) != interval


def test_what_repeats_within_a_block_is_counted_once() -> None:
    values = np.random.default_rng(4).normal(size=100)
    repeated = np.repeat(values, 16)
    honest = bootstrap_interval(repeated.tolist(), np.repeat(range(100), 16).tolist())
    once = bootstrap_interval(values.tolist(), range(100))
    assert (honest.low, honest.high) == (pytest.approx(once.low), pytest.approx(once.high))
    naive = bootstrap_interval(repeated.tolist(), range(1600))
    assert honest.high - honest.low > 3 * (naive.high - naive.low)


def test_weights_make_it_a_ratio_of_sums() -> None:
    interval = bootstrap_interval([1, 6], [0, 1], weights=[10, 20])
    assert interval.value == pytest.approx(7 / 30)
    assert (interval.low, interval.high) == (0.1, 0.3)
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_interval([0, 0], [0, 1], weights=[0, 0])


def test_a_rising_function_moves_all_three_numbers() -> None:
    assert Interval(0.0, -1.0, 1.0).map(math.exp) == Interval(1.0, math.exp(-1), math.exp(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"predictor": "none", "eviction": "none"},
        {"predictor": "lookahead", "eviction": "history"},
        {"policy": "speculate-when", "confidence": 1.0},
    ],
    ids=str,
)
def test_what_is_exact_costs_exactly_nothing(
    settings: dict[str, Any], open_on: Callable[..., Engine]
) -> None:
    report = evaluate(open_on(**settings), TOKENS, num_prompt_tokens=8)
    assert report.kl_vs_exact == Interval(0.0, 0.0, 0.0)
    assert report.perplexity_ratio == Interval(1.0, 1.0, 1.0)
    assert report.top1_agreement == Interval(1.0, 1.0, 1.0)
    assert report.speculated_fraction == Interval(0.0, 0.0, 0.0)
    assert report.perplexity == report.exact_perplexity


def test_perplexity_is_that_of_transformers(
    checkpoint: Path, open_on: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreload.evaluate._WINDOW_TOKENS", 50)
    report = evaluate(open_on(), TOKENS, num_prompt_tokens=10)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses = []
    for start in (0, 50, 100):
        window = torch.tensor(TOKENS[start : start + 50])
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(logits[10:-1], window[11:], reduction="none")
        )
    assert report.num_windows == 3
    assert report.num_tokens == len(torch.cat(losses)) == 39 + 39 + 9
    wanted = float(torch.cat(losses).double().mean().exp())
    assert report.exact_perplexity.value == pytest.approx(wanted, rel=1e-4)


def force(engine: Engine, num_prompt_tokens: int) -> torch.Tensor:
    cache, _ = prefill_exactly(engine, TOKENS[:num_prompt_tokens])
    rest = torch.tensor(TOKENS[num_prompt_tokens:-1])
    return torch.stack([engine.forward(token.view(1, 1), cache) for token in rest])


def test_what_speculation_costs_is_what_a_decode_by_hand_shows(
    open_on: Callable[..., Engine],
) -> None:
    engine = open_on(**SPECULATE)
    report = evaluate(engine, TOKENS, num_prompt_tokens=8)
    exact, other = force(open_on(), 8), force(engine, 8)
    quality = compare_logits(exact, other, torch.tensor(TOKENS[9:]))
    assert report.kl_vs_exact.value == pytest.approx(float(quality.kl.mean()))
    assert report.kl_vs_exact.low > 0
    assert report.top1_agreement.value == pytest.approx(float(quality.agrees.double().mean()))
    ratio = math.exp(float((quality.nll - quality.nll_exact).mean()))
    assert report.perplexity_ratio.value == pytest.approx(ratio)
    assert report.perplexity_ratio.low < ratio < report.perplexity_ratio.high


def test_only_the_policys_decoding_is_counted(open_on: Callable[..., Engine]) -> None:
    engine = open_on(**SPECULATE)
    pairs = []

    def see(event: RoutingEvent, wanted: list[int]) -> None:
        if len(event.top_k_index) == 1 and isinstance(engine.runtime.policy, Speculate):
            true = set(event.top_k_index[0].tolist())
            executed = set(event.executed_routing.top_k_index[0].tolist())
            pairs.append((len(true - executed), len(true)))

    engine.runtime.on_routing = see
    report = evaluate(engine, TOKENS, num_prompt_tokens=8)
    wrong, executed = map(sum, zip(*pairs, strict=True))
    assert wrong > 0
    assert report.speculated_fraction.value == pytest.approx(wrong / executed)
    assert executed == 2 * 4 * report.num_tokens


def test_a_prompt_of_one_token_is_read_exactly(open_on: Callable[..., Engine]) -> None:
    engine = open_on(**SPECULATE)
    _, logits = prefill_exactly(engine, TOKENS[:1])
    exact = open_on()
    assert torch.equal(logits, exact.forward(torch.tensor([TOKENS[:1]]), exact.make_cache()))
    assert isinstance(engine.runtime.policy, Speculate)
    with pytest.raises(ConfigError, match="prompt is empty"):
        prefill_exactly(engine, [])


def test_a_long_prompt_is_read_in_chunks(open_on: Callable[..., Engine]) -> None:
    engine = open_on(prefill_chunk=7)
    cache, _ = prefill_exactly(engine, TOKENS[:20])
    assert engine.metrics.num_steps == 3
    assert cache.get_seq_length() == 20


def test_the_policy_goes_first_in_every_window(
    open_on: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreload.evaluate._WINDOW_TOKENS", 60)
    engine = open_on(**SPECULATE)
    used: list[str] = []

    def see(event: RoutingEvent, wanted: list[int]) -> None:
        name = type(engine.runtime.policy).__name__
        if len(event.top_k_index) == 1 and used[-1:] != [name]:
            used.append(name)

    engine.runtime.on_routing = see
    evaluate(engine, TOKENS, num_prompt_tokens=8)
    assert used == ["Speculate", "Exact"] * 2


@pytest.mark.parametrize("at", [1, 50, 150])
def test_an_interruption_leaves_the_engine_as_it_was(
    at: int, open_on: Callable[..., Engine]
) -> None:
    engine = open_on(**SPECULATE)
    before = engine.runtime.policy
    reported = []

    def interrupt(stage: str, done: int, total: int) -> None:
        reported.append((done, total))
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, TOKENS, num_prompt_tokens=8, progress=interrupt)
    assert engine.runtime.policy is before
    assert reported[-1][1] == 2 * (len(TOKENS) - 9)
    assert len(engine.generate(TOKENS[:8], max_new_tokens=3).token_ids) == 3


def test_every_window_begins_with_the_texts_first_token(
    open_on: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_on()
    plain = engine.tokenizer
    first = 17

    class WithFirstToken:
        bos_token_id = first

        def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
            return {"input_ids": [first, *plain(text)["input_ids"]]}

    engine.tokenizer = WithFirstToken()
    monkeypatch.setattr("foreload.evaluate._WINDOW_TOKENS", 40)
    text = "def add(first, second): return first + second\n" * 20
    fed: list[list[int]] = []
    forward = engine.forward

    def see(token_ids: torch.Tensor, kv_cache: Any) -> torch.Tensor:
        if token_ids.shape[1] > 1:
            fed.append(token_ids[0].tolist())
        return forward(token_ids, kv_cache)

    engine.forward = see  # type: ignore[method-assign]
    report = evaluate(engine, text, max_tokens=60, num_prompt_tokens=8)
    assert report.num_windows == 2
    assert [prompt[0] for prompt in fed] == [first] * 4
    ids = plain(text)["input_ids"]
    assert fed[0][1:] == ids[:7]
    assert fed[2][1:] == ids[39:46]


def test_it_refuses_what_cannot_be_scored(open_on: Callable[..., Engine]) -> None:
    engine = open_on()
    with pytest.raises(ConfigError, match="leave 7 to score"):
        evaluate(engine, TOKENS[:16], num_prompt_tokens=8)
    with pytest.raises(ConfigError, match="windows of 512") as caught:
        evaluate(engine, TOKENS * 9, num_prompt_tokens=511)
    assert "510 at most" in str(caught.value.hint)
    for name in ("num_prompt_tokens", "max_tokens", "seed"):
        with pytest.raises(ConfigError, match=f"{name}=-1 must be a whole number"):
            evaluate(engine, TOKENS, **{name: -1})
    with pytest.raises(ConfigError, match="token 9999 of the text is outside the vocabulary"):
        evaluate(engine, [*TOKENS, 9999])
    assert engine.metrics.num_steps == 0
    engine.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        evaluate(engine, "some text")
    assert isinstance(engine.runtime.policy, Exact)


def test_the_verb_gives_the_report(
    call: Callable[..., Any], checkpoint: Path, text_file: Path
) -> None:
    words = ("evaluate", checkpoint, "--text", text_file, "--num-prompt-tokens", "8")
    settings = ("--policy", "speculate", "--predictor", "lookahead", "--max-tokens", "40")
    result = call(*words, *settings, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report.pop("text") == str(text_file)
    assert report.pop("config")["policy"] == "speculate"
    assert set(report) == set(EvaluationReport.__slots__)
    assert report["num_tokens"] == 40 - 9
    assert report["num_prompt_tokens"] == 8
    assert report["kl_vs_exact"]["low"] > 0
    assert set(report["kl_vs_exact"]) == {"value", "low", "high"}


def test_the_table_has_what_is_lost_and_what_is_gained(
    call: Callable[..., Any], checkpoint: Path, text_file: Path
) -> None:
    words = ("evaluate", checkpoint, "--text", text_file, "--num-prompt-tokens", "8")
    result = call(*words, "--max-tokens", "40")
    assert result.exit_code == 0, result.stderr
    for word in ("policy exact", "perplexity", "KL", "top-1", "speculated", "hit rate", "stall"):
        assert word in result.stdout
    assert "0.00000" in result.stdout


def test_a_text_beside_the_model_is_the_default(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    result = call("evaluate", checkpoint)
    assert result.exit_code == 2
    assert "held_out.txt" in result.stderr
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    shutil.copy(text_file, folder / "held_out.txt")
    result = call("evaluate", folder, "--max-tokens", "20", "--num-prompt-tokens", "4", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["text"].endswith("held_out.txt")
