"""The equations of a token's time: what bounds it, and what overlap can and cannot hide."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from foreload.cost import (
    DecodeWork,
    MachineRates,
    accept_length,
    amortised_intensity,
    cached_s,
    compute_roof,
    copy_s,
    dense_s,
    expert_s,
    io_roof,
    overlap_s,
    prefetched_s,
    resident_s,
    roofline_s,
    round_s,
    union_experts,
    wire_limit_s,
    wire_s,
)
from foreload.errors import ConfigError

WORK = DecodeWork(
    num_layers=4,
    num_experts=16,
    top_k=4,
    expert_bytes=100,
    stored_bytes=50,
    expert_flop=100,
    dense_bytes=800,
    dense_flop=800,
)
# An expert takes 1 s, a layer's dense part 2 s, a copy 5 s; a token computes for 24 s.
MACHINE = MachineRates(disk_bytes_s=10, memory_bytes_s=100)


def test_a_token_reads_its_dense_part_and_its_experts() -> None:
    assert WORK.token_bytes == 800 + 16 * 100
    assert WORK.token_flop == 800 + 16 * 100
    assert resident_s(WORK, MACHINE) == pytest.approx(WORK.token_bytes / 100)


def test_the_slower_of_memory_and_arithmetic_decides() -> None:
    assert roofline_s(300, 300, MACHINE) == 3.0
    assert roofline_s(300, 300, replace(MACHINE, flop_s=50)) == 6.0
    assert expert_s(WORK, replace(MACHINE, flop_s=50)) == 2.0


def test_calls_cost_the_same_in_every_layer() -> None:
    assert dense_s(WORK, MACHINE) == 2.0
    slow = replace(MACHINE, layer_s=0.5)
    assert dense_s(WORK, slow) == 2.5
    assert resident_s(WORK, slow) == resident_s(WORK, MACHINE) + 4 * 0.5


def test_the_wire_carries_what_misses_as_it_is_stored() -> None:
    assert copy_s(WORK, MACHINE) == 5.0
    assert wire_s(WORK, MACHINE, 0.0) == 16 * 5.0
    assert wire_s(WORK, MACHINE, 0.75) == 4 * 5.0
    assert wire_limit_s(WORK, MACHINE, 0.75) == 24.0
    assert wire_limit_s(WORK, MACHINE, 0.0) == 80.0


def test_overlap_hides_the_shorter_where_nothing_disturbs() -> None:
    assert overlap_s(3, 7) == 7
    assert overlap_s(7, 3) == 7
    assert overlap_s(7, 0) == 7


def test_shares_that_add_up_to_one_leave_nothing_to_gain() -> None:
    assert overlap_s(3, 7, compute_share=0.6, copy_share=0.4) == pytest.approx(10)
    assert overlap_s(7, 3, compute_share=0.6, copy_share=0.4) == pytest.approx(10)


def test_what_is_left_of_the_longer_one_runs_at_full_speed() -> None:
    # 2 s of computing take 4 s beside copies; the other 6 s of copying are undisturbed.
    assert overlap_s(2, 10, compute_share=0.5) == pytest.approx(10)
    # 2 s of copying cost 1 s of computing.
    assert overlap_s(10, 2, compute_share=0.5) == pytest.approx(11)


def test_on_demand_waits_for_all_copies_and_computes_the_last_expert_after_them() -> None:
    # dense 2 s, four copies of 5 s with three experts beside them, the last expert 1 s.
    assert cached_s(WORK, MACHINE, 0.0) == pytest.approx(4 * (2 + 20 + 1))


def test_a_cache_lies_between_on_demand_and_all_resident() -> None:
    times = [cached_s(WORK, MACHINE, rate) for rate in (0.0, 0.3, 0.5, 0.9, 1.0)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == resident_s(WORK, MACHINE)


def test_half_a_miss_costs_half_of_what_a_miss_costs() -> None:
    one = cached_s(WORK, MACHINE, 0.75)
    none = cached_s(WORK, MACHINE, 1.0)
    assert cached_s(WORK, MACHINE, 0.875) == pytest.approx((one + none) / 2)


def test_perfect_prefetch_reaches_the_wire_limit() -> None:
    for rate in (0.0, 0.5, 0.9):
        assert prefetched_s(WORK, MACHINE, rate) == wire_limit_s(WORK, MACHINE, rate)


def test_prefetch_without_recall_gains_nothing() -> None:
    for rate in (0.0, 0.5, 0.9):
        assert prefetched_s(WORK, MACHINE, rate, 0.0) == cached_s(WORK, MACHINE, rate)


def test_better_guesses_never_cost_time() -> None:
    times = [prefetched_s(WORK, MACHINE, 0.5, recall) for recall in (0.0, 0.4, 0.8, 1.0)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_guessing_is_charged_for() -> None:
    guessing = replace(MACHINE, prediction_s=0.25)
    assert prefetched_s(WORK, guessing, 0.5) == prefetched_s(WORK, MACHINE, 0.5) + 4 * 0.25
    assert cached_s(WORK, guessing, 0.5) == cached_s(WORK, MACHINE, 0.5)


def test_every_copy_is_asked_for_whether_hidden_or_not() -> None:
    calling = replace(MACHINE, call_s=0.1)
    assert cached_s(WORK, calling, 0.5) == pytest.approx(cached_s(WORK, MACHINE, 0.5) + 4 * 2 * 0.1)
    assert prefetched_s(WORK, calling, 0.9) == pytest.approx(24.0 + 16 * 0.1 * 0.1)
    assert resident_s(WORK, calling) == resident_s(WORK, MACHINE)


def test_uniform_routing_hits_what_fits() -> None:
    assert WORK.share_that_fits(16) == 0.25
    assert WORK.share_that_fits(1000) == 1.0


@pytest.mark.parametrize(
    "rates",
    [
        {"disk_bytes_s": 0},
        {"memory_bytes_s": -1},
        {"flop_s": float("nan")},
        {"layer_s": -0.1},
        {"call_s": -0.1},
        {"compute_share": 0},
        {"copy_share": 1.5},
    ],
)
def test_a_machine_that_cannot_be_is_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(rates))):
        replace(MACHINE, **rates)


class TestRounds:
    def test_a_round_brings_one_token_and_those_accepted_in_a_row(self) -> None:
        assert accept_length([]) == 1
        assert accept_length([1.0] * 4) == 5
        assert accept_length([0.0, 1.0, 1.0]) == 1
        assert accept_length([0.5, 0.5]) == 1 + 0.5 + 0.25
        assert accept_length([0.9, 0.8, 0.7]) == pytest.approx(1 + 0.9 + 0.72 + 0.504)

    def test_the_expected_length_is_the_mean_of_rounds(self) -> None:
        acceptance, chance = [0.9, 0.6, 0.8], random.Random(0)
        total, num_rounds = 0, 4000
        for _ in range(num_rounds):
            total += 1 + next((i for i, p in enumerate(acceptance) if chance.random() >= p), 3)
        assert accept_length(acceptance) == pytest.approx(total / num_rounds, rel=0.02)

    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 100])
    def test_independent_tokens_want_the_union_of_random_choices(self, num_tokens: int) -> None:
        missed = (1 - 4 / 16) ** num_tokens
        assert union_experts(num_tokens, 16, 4) == pytest.approx(16 * (1 - missed))

    def test_one_token_wants_its_own_and_many_want_all(self) -> None:
        for growth in (0.5, 1.0):
            assert union_experts(1, 64, 8, growth) == pytest.approx(8)
        assert union_experts(1000, 64, 8) == pytest.approx(64)
        assert union_experts(3, 8, 8) == 8

    def test_neighbours_that_share_experts_want_fewer(self) -> None:
        unions = [union_experts(6, 64, 8, growth) for growth in (0.3, 0.6, 1.0)]
        assert unions == sorted(unions)
        assert 8 < unions[0] < unions[-1] < 48

    def test_the_longer_of_computing_and_copying_decides(self) -> None:
        assert round_s(2.0, 3.0, 4.0) == 5.0
        assert round_s(2.0, 3.0, 7.0) == 7.0
        assert round_s(0.0, 3.0, 0.0) == 3.0

    def test_what_is_not_hidden_comes_on_top(self) -> None:
        assert round_s(2.0, 3.0, 4.0, overlap=0.0) == 9.0
        assert round_s(2.0, 3.0, 4.0, overlap=0.75) == 6.0
        assert round_s(2.0, 3.0, 7.0, overlap=0.5) == 9.5

    def test_intensity_is_tokens_per_byte_copied(self) -> None:
        assert amortised_intensity(3.0, 6e8) == pytest.approx(5e-9)
        assert amortised_intensity(3.0, 0.0) == math.inf

    def test_the_link_and_the_processor_each_set_a_roof(self) -> None:
        assert io_roof(5e-9, 2e9) == pytest.approx(10.0)
        assert compute_roof(3.0, 0.1, 0.2) == pytest.approx(10.0)

    @pytest.mark.parametrize("link_bytes_s", [0.0, 2e9])
    def test_what_copies_nothing_has_no_roof_of_copies(self, link_bytes_s: float) -> None:
        assert io_roof(math.inf, link_bytes_s) == math.inf

    @pytest.mark.parametrize("overlap", [0.0, 0.7, 1.0])
    @pytest.mark.parametrize("copied_bytes", [1e7, 5e8, 1e10])
    def test_no_round_is_faster_than_either_roof(self, overlap: float, copied_bytes: float) -> None:
        length = accept_length([0.9, 0.8])
        taken_s = round_s(0.05, 0.12, copied_bytes / 1e9, overlap)
        roofs = (
            io_roof(amortised_intensity(length, copied_bytes), 1e9),
            compute_roof(length, 0.05, 0.12),
        )
        assert length / taken_s <= min(roofs) * (1 + 1e-9)
        if overlap == 1.0:
            assert length / taken_s == pytest.approx(min(roofs))
