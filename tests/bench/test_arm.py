"""An arm says what it may execute and what takes a part of its memory."""

from __future__ import annotations

import json

import pytest

from foreload.bench.arm import Arm, Sample


@pytest.mark.parametrize(
    ("arm", "is_lossy"),
    [
        (Arm("stock", implementation="eager"), False),
        (Arm("plain", {}), False),
        (Arm("exact", {"policy": "exact", "predictor": "lookahead"}), False),
        (Arm("speculate", {"policy": "speculate"}), True),
        (Arm("when", {"policy": "speculate-when"}), True),
        (Arm("rounds", {"draft": "int4"}), False),
        (Arm("draft alone", {"draft": "int4"}, is_draft_alone=True), True),
        (Arm("oracle", {}, is_oracle=True), False),
    ],
    ids=lambda value: value.name if isinstance(value, Arm) else str(value),
)
def test_what_may_differ_from_the_true_experts_is_lossy(arm: Arm, is_lossy: bool) -> None:
    assert arm.is_lossy is is_lossy


@pytest.mark.parametrize(
    ("settings", "has_draft"),
    [
        (None, False),
        ({}, False),
        ({"draft": "none"}, False),
        ({"draft": "int4"}, True),
        ({"draft": "int8", "num_draft_tokens": 0}, True),
    ],
    ids=str,
)
def test_quantised_experts_take_memory_whether_they_are_used_or_not(
    settings: dict[str, object] | None, has_draft: bool
) -> None:
    assert Arm("arm", settings).has_draft is has_draft


def test_a_sample_is_json() -> None:
    sample = Sample(
        arm="rounds",
        budget=0.5,
        trial=1,
        tpot_s=0.1,
        prefill_s=0.5,
        step_s=[0.1, 0.2],
        is_equal=True,
        rounds={0: 2, 4: 3},
        verifications=[[5, 0.1, 40, 3]],
        roofs=[{"num_draft_tokens": 0}],
    )
    values = json.loads(json.dumps(sample.to_dict()))
    assert values["arm"] == "rounds"
    assert values["rounds"] == {"0": 2, "4": 3}
    assert values["verifications"] == [[5, 0.1, 40, 3]]
    assert (values["num_other"], values["acceptance_rate"]) == (0, None)
    restored = Sample(**{**values, "rounds": {int(k): n for k, n in values["rounds"].items()}})
    assert restored == sample
