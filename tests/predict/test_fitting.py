"""Networks learn what the features hold, the same way each time, and go on where they stopped."""

from __future__ import annotations

import torch
from test_estimator import Router, corrected, random

from foreload.predict.estimator import LayerNetwork
from foreload.predict.fitting import FeatureBuffer, Fitter

EXPERTS, HIDDEN, TOP_K, TOKENS = 6, 8, 2, 1024


def features(seed: int = 0) -> FeatureBuffer:
    """Tokens whose routing is decided by the token before."""
    made = FeatureBuffer({1: EXPERTS}, TOKENS, HIDDEN, TOP_K, torch.float32)
    made.size = TOKENS
    made.hidden[1] = random(TOKENS, HIDDEN, seed=seed)
    made.previous[1] = random(TOKENS, HIDDEN, seed=seed + 1)
    logits = 3 * made.previous[1] @ random(HIDDEN, EXPERTS, seed=99)
    made.target[1] = logits.softmax(-1)
    made.index[1] = logits.topk(TOP_K).indices
    return made


def fitter(num_passes: int = 4) -> tuple[Fitter, LayerNetwork]:
    torch.manual_seed(0)
    network = LayerNetwork(HIDDEN, EXPERTS, 32)
    routers = {1: corrected(Router(0), network)}
    return Fitter(routers, num_batches=4 * num_passes, seed=7), network


def test_training_brings_the_divergence_on_other_tokens_down() -> None:
    made, _ = fitter(40)
    other = features(seed=10)
    before = made.measure(other)
    reported: list[int] = []
    losses = [made.run_pass(features(), reported.append) for _ in range(40)]
    assert made.measure(other) < 0.75 * before
    assert losses[-1] < losses[0]
    assert reported == list(range(1, 161))


def test_the_routers_weights_get_no_gradients() -> None:
    torch.manual_seed(0)
    router = Router(0)
    router.weight.requires_grad_()
    made = Fitter({1: corrected(router, LayerNetwork(HIDDEN, EXPERTS, 4))}, num_batches=4, seed=0)
    made.run_pass(features(), lambda batch: None)
    assert router.weight.grad is None


def test_the_same_seed_gives_the_same_networks() -> None:
    states = []
    for _ in range(2):
        made, network = fitter()
        made.run_pass(features(), lambda batch: None)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_interrupted_training_ends_like_an_uninterrupted_one() -> None:
    whole, wanted = fitter()
    for _ in range(3):
        whole.run_pass(features(), lambda batch: None)
    first, network = fitter()
    first.run_pass(features(), lambda batch: None)
    state, weights, done = first.state(), network.state_dict(), first.num_done
    second, resumed = fitter()
    resumed.load_state_dict(weights)
    second.load_state({name: value.clone() for name, value in state.items()}, done)
    for _ in range(2):
        second.run_pass(features(), lambda batch: None)
    for name, value in wanted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_part_of_the_tokens_is_like_a_buffer_of_them() -> None:
    whole = features()
    part = whole.rows(100, 140)
    assert part.size == 40
    assert torch.equal(part.hidden[1], whole.hidden[1][100:140])
    assert whole.size == TOKENS


def test_the_memory_of_a_token_is_what_the_buffer_takes() -> None:
    made = FeatureBuffer({1: EXPERTS, 2: 4}, 10, HIDDEN, TOP_K, torch.bfloat16)
    tensors = [*made.hidden.values(), *made.previous.values(), *made.target.values()]
    num_bytes = sum(t.numel() * t.itemsize for t in (*tensors, *made.index.values()))
    per_token = FeatureBuffer.bytes_per_token({1: EXPERTS, 2: 4}, HIDDEN, TOP_K, torch.bfloat16)
    assert num_bytes == 10 * per_token
