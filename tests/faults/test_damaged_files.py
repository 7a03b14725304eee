"""Files that are cut, lie or vanish end in an error that names them, at once or when it matters."""

from __future__ import annotations

import json
import os
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fakes import assert_settled, finish, make_engine
from foreload.errors import CheckpointError, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foreload import Engine

    Open = Callable[..., Engine]

PROMPT = list(range(40, 52))


def expert_shard(folder: Path) -> Path:
    """Give the file that holds the last layer's last expert."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / index["model.layers.3.mlp.experts.15.down_proj.weight"]


def change_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header in place; the data stay where they are."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    file.write_bytes(raw[:8] + text.ljust(length) + raw[8 + length :])


def beyond_the_end(header: dict[str, Any]) -> None:
    entries = [entry for name, entry in header.items() if ".experts." in name]
    last = max(entries, key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]


def overlapping(header: dict[str, Any]) -> None:
    entries = [entry for name, entry in header.items() if ".experts." in name]
    first, second = [e for e in entries if e["shape"] == entries[0]["shape"]][:2]
    second["data_offsets"] = first["data_offsets"]


def another_shape(header: dict[str, Any]) -> None:
    entry = next(entry for name, entry in header.items() if ".experts." in name)
    entry["shape"] = [entry["shape"][0] + 1, entry["shape"][1]]


def transposed(header: dict[str, Any]) -> None:
    entry = next(entry for name, entry in header.items() if ".experts." in name)
    entry["shape"] = entry["shape"][::-1]


@pytest.mark.parametrize("lie", [beyond_the_end, overlapping, another_shape, transposed])
def test_a_header_that_lies_is_found_before_anything_is_allocated(
    checkpoint_copy: Path, lie: Callable[[dict[str, Any]], None]
) -> None:
    change_header(expert_shard(checkpoint_copy), lie)
    threads = threading.active_count()
    with pytest.raises(CheckpointError) as caught:
        make_engine(checkpoint_copy, expert_memory="100%", backend=never)
    assert "experts" in str(caught.value) or expert_shard(checkpoint_copy).name in str(caught.value)
    assert threading.active_count() == threads


def never(arena: Any) -> Any:
    raise AssertionError("an arena was made for a checkpoint that lies")


def test_a_shard_that_is_cut_is_found_at_load(checkpoint_copy: Path) -> None:
    shard = expert_shard(checkpoint_copy)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=shard.name):
        make_engine(checkpoint_copy, expert_memory="100%")


def test_a_shard_that_is_missing_is_found_at_load(checkpoint_copy: Path) -> None:
    shard = expert_shard(checkpoint_copy)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        make_engine(checkpoint_copy, expert_memory="100%")


@pytest.mark.parametrize("predictor", ["none", "lookahead"])
def test_a_shard_cut_after_loading_fails_the_request_and_can_be_restored(
    open_engine: Open, checkpoint_copy: Path, predictor: str
) -> None:
    engine = open_engine(checkpoint_copy, expert_memory="minimum", predictor=predictor)
    wanted = engine.generate(PROMPT, max_new_tokens=4).token_ids
    shard = expert_shard(checkpoint_copy)
    whole, changed_ns = shard.read_bytes(), shard.stat().st_mtime_ns
    os.truncate(shard, 5000)
    for _ in range(2):
        with pytest.raises(TransferError, match="ended early") as caught:
            finish(lambda: engine.generate(PROMPT, max_new_tokens=4))
        assert shard.name in str(caught.value)
        engine.tiers.cache.check()
    shard.write_bytes(whole)
    os.utime(shard, ns=(changed_ns, changed_ns))
    assert engine.generate(PROMPT, max_new_tokens=4).token_ids == wanted
    assert_settled(engine.tiers)


@pytest.mark.parametrize("predictor", ["none", "lookahead"])
@pytest.mark.parametrize("is_read", [True, False], ids=["after it was read", "before"])
def test_a_shard_written_to_after_loading_fails_the_request(
    open_engine: Open, checkpoint_copy: Path, predictor: str, is_read: bool
) -> None:
    engine = open_engine(checkpoint_copy, expert_memory="minimum", predictor=predictor)
    if is_read:
        engine.generate(PROMPT, max_new_tokens=4)
    shard = expert_shard(checkpoint_copy)
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    with shard.open("r+b") as stream:
        stream.seek(start)
        stream.write(raw[start:][::-1])
    for _ in range(2):
        with pytest.raises(TransferError, match="was changed after") as caught:
            finish(lambda: engine.generate(PROMPT, max_new_tokens=4))
        assert shard.name in str(caught.value)
        engine.tiers.cache.check()
    assert_settled(engine.tiers)


def test_files_replaced_while_running_are_still_read_as_they_were(
    open_engine: Open, checkpoint_copy: Path
) -> None:
    engine = open_engine(checkpoint_copy, expert_memory="minimum", predictor="none")
    wanted = engine.generate(PROMPT, max_new_tokens=6).token_ids
    for shard in checkpoint_copy.glob("*.safetensors"):
        other = shard.with_suffix(".new")
        other.write_bytes(bytes(shard.stat().st_size))
        other.replace(shard)
    assert engine.generate(PROMPT, max_new_tokens=6).token_ids == wanted


def test_files_deleted_while_running_are_still_read(
    open_engine: Open, checkpoint_copy: Path
) -> None:
    engine = open_engine(checkpoint_copy, expert_memory="minimum", predictor="none")
    wanted = engine.generate(PROMPT, max_new_tokens=6).token_ids
    for shard in checkpoint_copy.glob("*.safetensors"):
        shard.unlink()
    before = engine.metrics.snapshot()
    assert engine.generate(PROMPT, max_new_tokens=6).token_ids == wanted
    assert engine.metrics.since(before).demand_bytes > 0, "everything was resident: no test"


def test_files_deleted_before_they_were_opened_fail_clearly(
    open_engine: Open, checkpoint_copy: Path
) -> None:
    engine = open_engine(checkpoint_copy, expert_memory="minimum", predictor="none")
    for shard in checkpoint_copy.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(TransferError, match="cannot open") as caught:
        finish(lambda: engine.generate(PROMPT, max_new_tokens=2))
    assert "must stay where it was" in str(caught.value.hint)
    assert_settled(engine.tiers)
