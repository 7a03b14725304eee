"""A draft is built whole or not at all, and is read only where it belongs."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drafting import KINDS, MOST_ERROR, build, errors_of, make_inputs, read

from foreload.errors import CheckpointError, TransferError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model import draft_files
from foreload.model.draft_files import (
    draft_folder,
    has_draft,
    read_draft,
    read_or_build_draft,
)
from foreload.model.hf import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from foreload.model.draft import DraftExperts
    from foreload.model.hf import LoadedModel


class TestBuilding:
    def test_progress_comes_to_all_bytes(self, loaded: LoadedModel, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        build(
            loaded, tmp_path / "draft", search=False, progress=lambda *numbers: seen.append(numbers)
        )
        whole = sum(plan.read_bytes for layer in loaded.plans for plan in layer)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert {total for _, total in seen} == {whole}
        assert seen[-1][0] == whole
        assert len(seen) == 64

    def test_importance_is_asked_for_by_layer_and_matrix(
        self, loaded: LoadedModel, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        asked: set[tuple[int, str]] = set()

        def importance(layer: int, name: str) -> Tensor | None:
            asked.add((layer, name))
            if (layer, name) != (0, "first"):
                return None
            return torch.linspace(0.0, 1.0, 64) ** 8

        build(loaded, tmp_path / "draft", importance=importance)
        assert asked == {(layer, name) for layer in range(4) for name in ("first", "down")}
        plain, weighted = (read(loaded, f) for f in (folders["int4"], tmp_path / "draft"))
        for layer in range(4):
            inputs = make_inputs(loaded, layer, 4)
            experts = loaded.sites[layer].experts
            one, other = (d.run_layer(layer, experts, *inputs) for d in (plain, weighted))
            assert torch.equal(one, other) is (layer > 0)

    def test_what_was_there_before_is_replaced(self, loaded: LoadedModel, tmp_path: Path) -> None:
        folder = tmp_path / "draft"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "leftover").write_text("of another time")
        build(loaded, folder, "int8")
        assert not (folder / "leftover").exists()
        assert max(errors_of(loaded, read(loaded, folder, "int8"), 4)) < MOST_ERROR["int8"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("had_one", [False, True])
    def test_an_interrupted_build_leaves_nothing_behind(
        self,
        loaded: LoadedModel,
        folders: dict[str, Path],
        tmp_path: Path,
        error: type[BaseException],
        had_one: bool,
    ) -> None:
        folder = tmp_path / "draft"
        if had_one:
            shutil.copytree(folders["int8"], folder)
        before = set(threading.enumerate())

        def progress(done: int, total: int) -> None:
            if done > total / 2:
                raise error

        with pytest.raises(error):
            build(loaded, folder, "int8", progress=progress)
        assert list(tmp_path.iterdir()) == []
        assert not has_draft(folder)
        assert set(threading.enumerate()) == before

    def test_an_expert_that_cannot_be_read_fails_the_build(
        self, checkpoint_copy: Path, tmp_path: Path
    ) -> None:
        loaded = load_model(checkpoint_copy)
        for file in checkpoint_copy.glob("*.safetensors"):
            with file.open("r+b") as stream:
                stream.truncate(4096)
        drafts = tmp_path / "drafts"
        with pytest.raises(TransferError, match="ended early"):
            build(loaded, drafts / "draft")
        assert list(drafts.iterdir()) == []


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def cut_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)


def flip_the_first_codes(folder: Path) -> None:
    path = folder / "model.safetensors"
    entry = CheckpointIndex.open(folder)["layers.0.experts.0.draft"]
    raw = bytearray(path.read_bytes())
    for place in range(entry.offset, entry.offset + 64):
        raw[place] ^= 0xFF
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no description": lambda folder: (folder / "config.json").unlink(),
    "a description that is none": lambda folder: (folder / "config.json").write_text("[1"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": cut_weights,
    "other codes": flip_the_first_codes,
    "another version": edit_config(version=0),
    "another witness": edit_config(witness=[0.0] * 64),
    "no witness": edit_config(witness=None),
    "other formats": edit_config(formats=[]),
}


class TestReading:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_damaged_draft_is_refused_with_what_to_do(
        self,
        loaded: LoadedModel,
        folders: dict[str, Path],
        tmp_path: Path,
        kind: str,
        damage: str,
    ) -> None:
        folder = shutil.copytree(folders[kind], tmp_path / "draft")
        read(loaded, folder, kind)
        DAMAGES[damage](folder)
        with pytest.raises(CheckpointError) as caught:
            read(loaded, folder, kind)
        assert "built again" in str(caught.value.hint)

    def test_another_kind_is_refused(self, loaded: LoadedModel, folders: dict[str, Path]) -> None:
        with pytest.raises(CheckpointError, match="another checkpoint"):
            read(loaded, folders["int4"], "int8")

    def test_another_checkpoints_draft_is_refused(
        self, loaded: LoadedModel, folders: dict[str, Path]
    ) -> None:
        with pytest.raises(CheckpointError, match="another checkpoint"):
            read_draft(loaded.sites, loaded.plans, "0" * 64, folders["int4"], "int4")

    def test_reading_changes_nothing_on_disk(
        self, loaded: LoadedModel, folders: dict[str, Path]
    ) -> None:
        files = {path: path.read_bytes() for path in folders["int4"].iterdir()}
        draft = read(loaded, folders["int4"])
        draft._layers[0].first[0].weight.fill_(0)  # type: ignore[union-attr]
        assert {path: path.read_bytes() for path in folders["int4"].iterdir()} == files


def read_or_build(
    loaded: LoadedModel, folder: Path, progress: Callable[[int, int], None] | None = None
) -> DraftExperts:
    identity = loaded.spec.identity
    return read_or_build_draft(
        loaded.sites, loaded.plans, identity, folder, "int4", progress=progress
    )


class Waited(logging.Handler):
    """Remembers that somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("waiting"):
            self.event.set()


@pytest.fixture
def waited() -> Iterator[threading.Event]:
    handler = Waited()
    draft_files.logger.addHandler(handler)
    yield handler.event
    draft_files.logger.removeHandler(handler)


LEFTOVER = ".draft.0123abcd.partial"

DIES_BUILDING = f"""
import fcntl, os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
lock = open(folder / ".draft.lock", "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
(folder / "{LEFTOVER}").mkdir()
(folder / "{LEFTOVER}" / "model.safetensors").write_bytes(b"half of it")
print("locked", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestTurns:
    def test_of_two_that_want_a_draft_one_builds_it_and_the_other_uses_it(
        self, loaded: LoadedModel, tmp_path: Path, waited: threading.Event
    ) -> None:
        built: list[str] = []
        folder = tmp_path / "drafts" / "draft"

        def progress(name: str, done: int, total: int) -> None:
            built.append(name)
            # In the middle of the build, until the other one has come to wait for it.
            started.set()
            assert waited.wait(20)

        started = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(read_or_build, loaded, folder, partial(progress, "first"))
            assert started.wait(20)
            second = pool.submit(read_or_build, loaded, folder, partial(progress, "second"))
            drafts = [first.result(), second.result()]
        assert set(built) == {"first"}
        assert drafts[0].num_bytes == drafts[1].num_bytes
        assert {path.name for path in folder.parent.iterdir()} == {"draft", ".draft.lock"}

    def test_where_the_builder_fails_the_one_who_waits_builds(
        self, loaded: LoadedModel, tmp_path: Path, waited: threading.Event
    ) -> None:
        folder = tmp_path / "draft"
        started = threading.Event()

        def give_up(done: int, total: int) -> None:
            started.set()
            assert waited.wait(20)
            raise KeyboardInterrupt

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(read_or_build, loaded, folder, give_up)
            assert started.wait(20)
            second = pool.submit(read_or_build, loaded, folder)
            with pytest.raises(KeyboardInterrupt):
                first.result()
            assert second.result().num_bytes > 0

    def test_a_builder_that_is_killed_blocks_nobody_and_leaves_nothing(
        self, loaded: LoadedModel, tmp_path: Path, waited: threading.Event
    ) -> None:
        folder = tmp_path / "draft"
        with (
            subprocess.Popen(
                [sys.executable, "-c", DIES_BUILDING, str(tmp_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as builder,
            ThreadPoolExecutor(1) as pool,
        ):
            assert builder.stdout is not None
            assert builder.stdin is not None
            assert builder.stdout.readline() == b"locked\n"
            draft = pool.submit(read_or_build, loaded, folder)
            assert waited.wait(20)
            builder.stdin.close()
            assert draft.result().num_bytes > 0
        assert {path.name for path in tmp_path.iterdir()} == {"draft", ".draft.lock"}

    def test_without_locks_it_builds_and_touches_nobody_elses(
        self, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(draft_files.fcntl, "flock", refuse)
        (tmp_path / LEFTOVER).mkdir()
        assert read_or_build(loaded, tmp_path / "draft").num_bytes > 0
        assert (tmp_path / LEFTOVER).is_dir(), "it may be at work"


class TestFolders:
    def test_checkpoints_kinds_and_processors_have_folders_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = draft_folder(tmp_path, "a" * 64, "int4")
        assert draft_folder(tmp_path, "a" * 64, "int4") == one
        others = {
            draft_folder(tmp_path, "b" * 64, "int4"),
            draft_folder(tmp_path, "a" * 64, "int8"),
        }
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Other CPU")
        others.add(draft_folder(tmp_path, "a" * 64, "int4"))
        assert len(others | {one}) == 4
        assert all(folder.is_relative_to(tmp_path) for folder in others)

    def test_a_draft_is_there_once_it_is_built(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        assert has_draft(folders["int4"])
        assert not has_draft(tmp_path)
        assert not has_draft(tmp_path / "nowhere")
