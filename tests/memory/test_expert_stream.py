"""Experts come through the ring in the order asked for, each whole."""

from __future__ import annotations

import pytest
import torch

from foreload.memory.expert_stream import ExpertStream

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 9])
@pytest.mark.parametrize("experts", [[], [4], [0, 1], [0, 2, 3, 5, 6, 7], [7, 7, 0]])
def test_every_block_is_the_experts(num_blocks: int, experts: list[int]) -> None:
    host = torch.randint(0, 256, (2, 8, 32), dtype=torch.uint8)
    stream = ExpertStream(host, CPU, num_blocks=num_blocks)
    assert stream.num_bytes == num_blocks * 32
    for layer in (1, 0):
        found = [block.clone() for block in stream.bring(layer, experts)]
        assert len(found) == len(experts)
        for expert, block in zip(experts, found, strict=True):
            assert torch.equal(block, host[layer, expert])


def test_a_stream_left_in_the_middle_begins_afresh() -> None:
    host = torch.randint(0, 256, (1, 8, 32), dtype=torch.uint8)
    stream = ExpertStream(host, CPU)
    blocks = stream.bring(0, [0, 1, 2, 3, 4, 5])
    next(blocks)
    next(blocks)
    blocks.close()
    for expert, block in zip((6, 7), stream.bring(0, [6, 7]), strict=True):
        assert torch.equal(block, host[0, expert])


def test_one_block_is_too_few() -> None:
    with pytest.raises(ValueError, match="least"):
        ExpertStream(torch.zeros((1, 1, 1), dtype=torch.uint8), CPU, num_blocks=1)
