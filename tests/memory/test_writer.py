import errno
import json
import shutil
import weakref
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from foreload.errors import CapacityError, ConfigError, ShapeError
from foreload.memory import writer as writer_module
from foreload.memory.writer import SafetensorsStreamWriter, remove_unfinished


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for expert in (0, 1, 10):
            for part in ("up", "down", "gate"):
                name = f"layers.{layer}.experts.{expert}.{part}.weight"
                tensors[name] = torch.randn(5, 7, generator=generator).bfloat16()
    tensors["norm.weight"] = torch.randn(3, generator=generator)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float16)
    tensors["empty"] = torch.empty(0, 4)
    tensors["count"] = torch.arange(3)
    return tensors


def write(tensors, output_dir, **settings):
    with SafetensorsStreamWriter(output_dir, **settings) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tensor.shape)
        for name in writer.names:
            writer.write(name, tensors[name])
    return writer


def write_one(output_dir, data, *, shape=(1,), and_declare=None):
    with SafetensorsStreamWriter(output_dir) as writer:
        writer.declare("a", torch.float32, shape)
        if and_declare:
            writer.declare(and_declare, torch.float32, (1,))
        writer.write("a", data)


def read_header(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return size, json.loads(raw[8 : 8 + size]), len(raw)


def assert_nothing_left(tmp_path):
    assert list(tmp_path.iterdir()) == []


def test_safetensors_reads_back_what_was_written(tmp_path):
    tensors = make_tensors()
    writer = write(tensors, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert writer.bytes_written == writer.total_bytes


def test_header_is_valid_and_data_starts_on_a_page(tmp_path):
    write(make_tensors(), tmp_path / "out")
    size, header, file_bytes = read_header(tmp_path / "out" / "model.safetensors")
    assert (8 + size) % 4096 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert file_bytes == 8 + size + end


def test_every_tensor_lies_on_a_multiple_of_its_element_size(tmp_path):
    write(make_tensors(), tmp_path / "out")
    _, header, _ = read_header(tmp_path / "out" / "model.safetensors")
    sizes = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    del header["__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_parts_of_an_expert_are_adjacent_and_experts_in_numeric_order(tmp_path):
    tensors = make_tensors()
    with SafetensorsStreamWriter(tmp_path / "out") as writer:
        for name in tensors:
            writer.declare(name, torch.bfloat16, tensors[name].shape)
        names = [name for name in writer.names if ".experts." in name]
        for name in writer.names:
            writer.write(name, tensors[name].bfloat16())
    assert [name.split(".")[3:5] for name in names[:9]] == [
        [expert, part] for expert in ("0", "1", "10") for part in ("down", "gate", "up")
    ]


def test_shards_respect_the_limit_and_never_split_an_expert(tmp_path):
    tensors = make_tensors()
    write(tensors, tmp_path / "out", shard_bytes=500)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert files.keys() == tensors.keys()
    assert len(set(files.values())) > 2
    assert set(files.values()) == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    for name, file in files.items():
        assert file == files[name.replace("up", "down")]
        with safe_open(tmp_path / "out" / file, framework="pt") as reader:
            assert torch.equal(reader.get_tensor(name), tensors[name])
    for path in (tmp_path / "out").glob("*.safetensors"):
        size, _, file_bytes = read_header(path)
        assert file_bytes - 8 - size <= 500


def test_pieces_are_joined_and_never_held_together(tmp_path):
    pieces = []
    alive = []

    def make_pieces():
        for i in range(20):
            alive.append(sum(ref() is not None for ref in pieces))
            piece = torch.full((1000,), float(i))
            pieces.append(weakref.ref(piece))
            yield piece

    with SafetensorsStreamWriter(tmp_path / "out") as writer:
        writer.declare("large", torch.float32, (20, 1000))
        writer.write("large", make_pieces())
    assert max(alive) <= 1
    read = load_file(tmp_path / "out" / "model.safetensors")["large"]
    assert torch.equal(read, torch.arange(20.0)[:, None].expand(20, 1000))


def test_non_contiguous_tensors_are_written_in_row_major_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    write({"a": tensor}, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], tensor)


def test_an_empty_directory_is_taken_and_a_filled_one_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write({"a": torch.ones(1)}, tmp_path / "empty")
    (tmp_path / "empty" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty directory"):
        SafetensorsStreamWriter(tmp_path / "empty")
    assert (tmp_path / "empty" / "mine.txt").read_text() == "keep"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty directory"):
        SafetensorsStreamWriter(tmp_path / "out")


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def appear():
        yield torch.ones(1)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")

    with pytest.raises(ConfigError, match="not an empty directory"):
        write_one(tmp_path / "out", appear())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_any_failure_leaves_nothing_behind(tmp_path):
    def interrupted():
        yield torch.ones(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one(tmp_path / "out", interrupted(), shape=(2,))
    assert_nothing_left(tmp_path)


def test_what_a_killed_writer_left_can_be_removed_and_nothing_else(tmp_path):
    write_one(tmp_path / "out", torch.ones(1))
    write_one(tmp_path / "out2", torch.ones(1))
    before = {*tmp_path.iterdir()}
    for name in ("out", "out2"):
        killed = SafetensorsStreamWriter(tmp_path / "parts" / name)
        killed.__enter__()
        killed.directory.rename(tmp_path / killed.directory.name)
    (tmp_path / "parts").rmdir()
    remove_unfinished(tmp_path / "out")
    (left,) = {*tmp_path.iterdir()} - before
    assert left.name.startswith(".out2.")


def test_a_tensor_never_written_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="never written, first 'b'"):
        write_one(tmp_path / "out", torch.ones(1), and_declare="b")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        torch.ones(2, 3),
        torch.ones(3, 2, dtype=torch.float16),
        [torch.ones(5)],
        [torch.ones(4), torch.ones(3)],
        [torch.ones(12, dtype=torch.float16)],
        [],
    ],
    ids=["shape", "dtype", "short", "long", "dtype of a piece", "nothing"],
)
def test_data_other_than_declared_are_refused(tmp_path, data):
    with pytest.raises(ShapeError):
        write_one(tmp_path / "out", data, shape=(3, 2))
    assert_nothing_left(tmp_path)


def test_order_and_declarations_are_enforced(tmp_path):
    with SafetensorsStreamWriter(tmp_path / "out") as writer:
        writer.declare("a", torch.float32, (1,))
        writer.declare("b", torch.float32, (1,))
        with pytest.raises(ConfigError, match="twice"):
            writer.declare("a", torch.float32, (1,))
        with pytest.raises(ConfigError, match="does not know"):
            writer.declare("c", torch.complex64, (1,))
        with pytest.raises(ConfigError, match="out of turn"):
            writer.write("b", torch.ones(1))
        with pytest.raises(ConfigError, match="order was fixed"):
            writer.declare("d", torch.float32, (1,))
        writer.write("a", torch.ones(1))
        writer.write("b", torch.ones(1))
        with pytest.raises(ConfigError, match="out of turn"):
            writer.write("b", torch.ones(1))


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="without tensors"):
        write({}, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_shard_limit_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="positive"):
        SafetensorsStreamWriter(tmp_path / "out", shard_bytes=0)


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 5_000, 5_000))
    with pytest.raises(CapacityError, match="disk is too full") as caught:
        write({"a": torch.ones(1000)}, tmp_path / "out")
    assert caught.value.available_bytes == 5_000
    assert caught.value.needed_bytes == 4096 + 4000
    assert_nothing_left(tmp_path)


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if len(data) > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = []

    def open_full(path, mode):
        opened.append(open(path, mode))  # noqa: SIM115
        return Full(opened[-1])

    monkeypatch.setattr(writer_module, "open", open_full, raising=False)
    with pytest.raises(CapacityError, match="disk is too full"):
        write({"a": torch.ones(10), "b": torch.ones(100_000)}, tmp_path / "out")
    assert_nothing_left(tmp_path)
    assert all(file.closed for file in opened)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    def broken():
        yield torch.ones(1)
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write_one(tmp_path / "out", broken(), shape=(2,))
    assert_nothing_left(tmp_path)
