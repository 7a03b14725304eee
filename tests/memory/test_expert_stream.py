"""Experts come through two buffers in the order asked for, each whole, some of them ahead."""

from __future__ import annotations

import itertools
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from foreload.memory.expert_stream import ExpertStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from foreload.ops.grouped import Chunk

CPU = torch.device("cpu")


def random_host() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 8, 32), dtype=torch.uint8, generator=generator)


def check(chunk: Chunk, host: torch.Tensor) -> list[int]:
    """Compare a chunk's blocks with one layer in host memory, and give whose they are."""
    for expert, place in zip(chunk.experts, chunk.places, strict=True):
        assert torch.equal(chunk.blocks[place], host[expert])
    return list(chunk.experts)


def check_all(chunks: Iterable[Chunk], host: torch.Tensor) -> list[int]:
    return [expert for chunk in chunks for expert in check(chunk, host)]


@pytest.mark.parametrize("chunk_blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("experts", [[], [4], [0, 1], [0, 2, 3, 5, 6, 7], [7, 6, 0]])
def test_every_block_is_the_experts(chunk_blocks: int, experts: list[int]) -> None:
    host = random_host()
    stream = ExpertStream(host, CPU, chunk_blocks=chunk_blocks)
    assert stream.num_bytes == 2 * chunk_blocks * 32
    for layer in (1, 0):
        chunks = [check(chunk, host[layer]) for chunk in stream.bring(layer, experts)]
        assert list(itertools.chain(*chunks)) == experts
        assert all(len(chunk) == chunk_blocks for chunk in chunks[:-1])


def test_a_chunk_stays_while_it_is_used_and_the_next_one_travels() -> None:
    host = random_host()
    stream = ExpertStream(host, CPU, chunk_blocks=2)
    chunks = stream.bring(0, [0, 1, 2, 3, 4, 5])
    # Two chunks are on their way before the first is asked for.
    assert torch.equal(stream._buffers.flatten(0, 1), host[0, :4])
    for number, chunk in enumerate(chunks):
        assert check(chunk, host[0]) == [2 * number, 2 * number + 1]


@pytest.mark.parametrize("wanted", [list(range(8)), [0, 2, 3, 7], [1, 5], [6, 7], []])
@pytest.mark.parametrize("chunk_blocks", [3, 8])
def test_the_next_layers_first_experts_are_sent_ahead(wanted: list[int], chunk_blocks: int) -> None:
    host = random_host()
    stream = ExpertStream(host, CPU, chunk_blocks=chunk_blocks)
    missing = [0, 1, 2, 4, 5]
    for chunk in stream.bring(0, [3, 4, 5, 6], then=(1, missing)):
        check(chunk, host[0])
    ahead = missing[:chunk_blocks]
    assert any(torch.equal(buffer[: len(ahead)], host[1, ahead]) for buffer in stream._buffers)
    # Whoever came ahead is not copied again.
    host[1, ahead] += 1
    chunks = stream.bring(1, wanted, then=(2, [7]))
    host[1, ahead] -= 1
    assert sorted(check_all(chunks, host[1])) == wanted
    assert stream.num_unused == len(set(ahead) - set(wanted))
    # Another layer is asked than the one that was expected.
    assert check_all(stream.bring(0, [7, 1]), host[0]) == [7, 1]
    assert stream.num_unused == len(set(ahead) - set(wanted)) + 1


def test_a_stream_left_in_the_middle_begins_afresh() -> None:
    host = random_host()
    stream = ExpertStream(host, CPU, chunk_blocks=2)
    chunks = stream.bring(0, [0, 1, 2, 3, 4, 5], then=(1, [0, 1]))
    next(chunks)
    next(chunks)
    del chunks
    found = [check(chunk, host[1]) for chunk in stream.bring(1, [0, 1, 6])]
    assert found == [[0, 1], [6]]
    assert stream.num_unused == 0


class PaperSide:
    """Writes down what is begun beside the computation, and what waits for what."""

    def __init__(self, done: list[str]) -> None:
        self.done = done
        self.begun = 0

    @contextmanager
    def forked(self) -> Iterator[None]:
        self.done.append(f"copy {self.begun}")
        yield

    def mark(self) -> int:
        self.begun += 1
        return self.begun - 1

    def join(self, mark: int) -> None:
        self.done.append(f"wait {mark}")


def test_copies_run_one_chunk_ahead_and_behind_what_reads_their_buffer() -> None:
    stream = ExpertStream(random_host(), CPU, chunk_blocks=2)
    done: list[str] = []
    stream._side = PaperSide(done)  # type: ignore[assignment]
    for number, _ in enumerate(stream.bring(0, [0, 1, 2, 3, 4, 5], then=(1, [0]))):
        done.append(f"compute {number}")
    first = ["copy 0", "copy 1", "wait 0", "compute 0", "copy 2", "wait 1", "compute 1"]
    assert done == [*first, "copy 3", "wait 2", "compute 2"]
    # What was sent ahead is waited for where it is used.
    done.clear()
    for _ in stream.bring(1, [0, 1]):
        done.append("compute")
    assert done == ["copy 4", "wait 3", "compute", "wait 4", "compute"]


def test_no_block_is_too_few() -> None:
    with pytest.raises(ValueError, match="one at least"):
        ExpertStream(torch.zeros((1, 1, 1), dtype=torch.uint8), CPU, chunk_blocks=0)


def test_released_it_holds_neither_buffers_nor_host_memory() -> None:
    host = random_host()
    held = weakref.ref(host)
    stream = ExpertStream(host, CPU, chunk_blocks=2)
    num_unused = stream.num_unused
    list(stream.bring(0, [0, 1], then=(1, [0])))
    del host
    for _ in range(2):
        stream.release()
        assert held() is None
        assert stream.num_bytes == 0
    assert stream.num_unused == num_unused
