"""The index believes no header: damaged checkpoints end in CheckpointError, whatever the damage."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from foreload.errors import CheckpointError
from foreload.memory.checkpoint import INDEX_NAME, ITEM_BITS, CheckpointIndex, read_stamp

if TYPE_CHECKING:
    from pathlib import Path

VALID_HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
VALID_DATA = bytes(range(32))

same_folder = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(sorted(ITEM_BITS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def pack(header: object, data: bytes = VALID_DATA, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(content)
    return folder


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_entries_point_at_the_bytes_of_each_tensor(tmp_path: Path) -> None:
    first, second = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.bfloat16)
    write_shards(tmp_path, {"x-1.safetensors": {"a": first}, "x-2.safetensors": {"b": second}})
    index = CheckpointIndex.open(tmp_path)
    assert sorted(index) == ["a", "b"]
    assert len(index) == 2
    assert "a" in index
    assert index["b"].shape == (4,)
    assert index.total_bytes == 32
    for name, tensor in (("a", first), ("b", second)):
        entry = index[name]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            data = torch.frombuffer(bytearray(file.read(entry.num_bytes)), dtype=tensor.dtype)
        assert torch.equal(data.view(entry.shape), tensor)


def test_entries_know_the_file_they_were_read_from(tmp_path: Path) -> None:
    file = write(tmp_path, pack(VALID_HEADER)) / "model.safetensors"
    os.utime(file, ns=(10**18, 10**18 + 7))
    stamp = CheckpointIndex.open(tmp_path)["a"].stamp
    assert stamp == CheckpointIndex.open(tmp_path)["b"].stamp
    assert stamp == (file.stat().st_size, 10**18 + 7)
    with file.open("r+b") as stream:
        assert read_stamp(stream.fileno()) == stamp
        stream.write(pack(VALID_HEADER)[:8])
        stream.flush()
        assert read_stamp(stream.fileno()) != stamp


def test_a_checkpoint_without_an_index_file_may_have_several_shards(tmp_path: Path) -> None:
    write_shards(
        tmp_path,
        {"p.safetensors": {"a": torch.zeros(1)}, "q.safetensors": {"b": torch.zeros(1)}},
    )
    (tmp_path / INDEX_NAME).unlink()
    assert sorted(CheckpointIndex.open(tmp_path)) == ["a", "b"]


def test_a_single_file_wins_over_stray_files(tmp_path: Path) -> None:
    write(tmp_path, pack(VALID_HEADER))
    write(tmp_path, b"rubbish", "adapter.safetensors")
    assert sorted(CheckpointIndex.open(tmp_path)) == ["a", "b"]


def test_identity_follows_headers_and_configuration_but_not_the_folder(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        write(folder, pack(VALID_HEADER))
    (folders[2] / "config.json").write_text('{"changed": 1}')
    same, again, other = (CheckpointIndex.open(folder).identity for folder in folders)
    assert same == again != other
    longer = pack(VALID_HEADER, VALID_DATA + b"more")
    assert CheckpointIndex.open(write(folders[0], longer)).identity != same


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty"),
        (["README.md"], "no safetensors files"),
        (["pytorch_model.bin"], "pickle checkpoint .*pytorch_model.bin"),
        (["consolidated.00.pth"], "pickle checkpoint"),
        (["model-Q4.gguf"], "GGUF checkpoint .*model-Q4.gguf"),
        (["tf_model.h5"], "TensorFlow"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointIndex.open(tmp_path)
    assert caught.value.hint


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointIndex.open(tmp_path / "nowhere")


def test_a_checkpoint_needs_its_configuration(tmp_path: Path) -> None:
    write(tmp_path, pack(VALID_HEADER))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        CheckpointIndex.open(tmp_path)


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {f"s{i}.safetensors": {f"t{i}": torch.zeros(1)} for i in range(3)})
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 shards are missing: s1\.safetensors"):
        CheckpointIndex.open(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    shards = {"p.safetensors": {"a": torch.zeros(1)}, "q.safetensors": {"a": torch.zeros(1)}}
    write_shards(tmp_path, shards)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"'a' is stored twice: in p.*q"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ghost": "p.safetensors"}, "'ghost' in p.safetensors, which does not hold it"),
        ({"a": "q.safetensors"}, "'a' in q.safetensors, but p.safetensors holds it"),
        ({"a": "../p.safetensors"}, "not a file name"),
        ({"a": None}, "not a file name"),
        ({"a": 7}, "not a file name"),
    ],
)
def test_the_index_file_must_agree_with_the_shards(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    weight_map: dict[str, Any] = write_shards(
        tmp_path,
        {
            "p.safetensors": {"a": torch.zeros(1), "c": torch.zeros(1)},
            "q.safetensors": {"b": torch.zeros(1)},
        },
    )
    weight_map |= change
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        CheckpointIndex.open(tmp_path)


def test_a_tensor_the_index_file_does_not_list_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path, {"p.safetensors": {"a": torch.zeros(1), "b": torch.zeros(1)}})
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "p.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"does not list 1 tensors of its shards: b"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_file_is_an_error(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path, {"p.safetensors": {"a": torch.zeros(1)}})
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CheckpointIndex.open(tmp_path)


def changed(name: str = "a", **fields: Any) -> dict[str, Any]:
    return VALID_HEADER | {name: VALID_HEADER[name] | fields}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        (pack(VALID_HEADER, length=2**63), "header claims"),
        (pack(VALID_HEADER, length=10**9), "header claims"),
        (pack(VALID_HEADER, length=0), "header claims"),
        (pack(b"{]"), "not valid JSON"),
        (pack(b"\xff\xfe"), "not valid JSON"),
        (pack(b"[1, 2]"), "not a JSON object"),
        (pack(b"[" * 100_000), "not valid JSON"),
        (pack(b'{"a": 1, "a": 2}'), "'a' stands twice"),
        (pack({"a": 3}), "'a' is not described"),
        (pack(changed(dtype="F31")), "'a' has the unknown element type 'F31'"),
        (pack(changed(dtype=["F32"])), "'a' has the unknown element type"),
        (pack(changed(shape=[2, -3])), "'a' has the impossible shape"),
        (pack(changed(shape=[2, 3.0])), "'a' has the impossible shape"),
        (pack(changed(shape=[2, True])), "'a' has the impossible shape"),
        (pack(changed(shape=[1] * 33)), "'a' has the impossible shape"),
        (pack(changed(shape=None)), "'a' has the impossible shape"),
        (pack(changed(data_offsets=[0])), "'a' has the impossible data_offsets"),
        (pack(changed(data_offsets=[24, 0])), "'a' claims bytes 24 to 0"),
        (pack(changed("b", data_offsets=[25, 33])), "'b' claims bytes 25 to 33"),
        (pack(changed("b", data_offsets=[20, 28])), "tensors 'a' and 'b' overlap"),
        (pack(changed(shape=[2, 2])), "'a' takes 24 bytes, which is not shape"),
        (pack(changed(shape=[10**300, 0, 6])), "'a' takes 24 bytes"),
        (pack(VALID_HEADER, VALID_DATA[:-1]), "'b' claims bytes 24 to 32"),
        (pack({}), "no tensors"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        CheckpointIndex.open(tmp_path)


def check_opens_or_explains(folder: Path) -> None:
    """Open `folder`: either all entries are sound, or CheckpointError says what is wrong."""
    size = (folder / "model.safetensors").stat().st_size
    try:
        index = CheckpointIndex.open(folder)
    except CheckpointError:
        return
    end = 0
    for entry in sorted(index.entries.values(), key=lambda e: (e.offset, e.num_bytes)):
        assert math.prod(entry.shape) * ITEM_BITS[entry.dtype] == 8 * entry.num_bytes
        assert entry.num_bytes == 0 or entry.offset >= end
        end = max(end, entry.offset + entry.num_bytes)
    assert end <= size


@same_folder
@given(content=st.binary(max_size=200))
def test_random_bytes_never_break_the_index(tmp_path: Path, content: bytes) -> None:
    check_opens_or_explains(write(tmp_path, content))


@same_folder
@given(header=json_values, data=st.binary(max_size=40))
def test_random_json_never_breaks_the_index(tmp_path: Path, header: Any, data: bytes) -> None:
    check_opens_or_explains(write(tmp_path, pack(header, data)))


@same_folder
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=json_values | st.lists(st.integers(-2, 40), max_size=3),
)
def test_a_random_field_never_breaks_the_index(tmp_path: Path, field: str, value: Any) -> None:
    check_opens_or_explains(write(tmp_path, pack(changed(**{field: value}))))


@same_folder
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_flipped_byte_or_a_cut_never_breaks_the_index(
    tmp_path: Path, position: int, byte: int, cut: int
) -> None:
    content = bytearray(pack(VALID_HEADER))
    content[position % len(content)] = byte
    check_opens_or_explains(write(tmp_path, bytes(content[: cut % (len(content) + 1)])))
    check_opens_or_explains(write(tmp_path, bytes(content)))


def test_indexing_needs_no_torch() -> None:
    code = "import sys, foreload.memory.checkpoint; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
