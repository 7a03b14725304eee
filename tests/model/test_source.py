"""What a user types becomes a folder, or an error that says what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from foreload.errors import CheckpointError, OfflineError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model import source
from foreload.model.source import open_headers, resolve_model

if TYPE_CHECKING:
    from pathlib import Path


class FakeHub:
    """Stands in for `snapshot_download`: remembers the call, answers or raises."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, repository: str = "", **options: Any) -> str:
        self.calls.append((repository, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def use_hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> FakeHub:
    hub = FakeHub(answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def http_error(kind: type[Exception], message: str) -> Exception:
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, AssertionError("the Hub was asked"))
    assert resolve_model(str(tmp_path)) == tmp_path
    assert not hub.calls


def test_a_hub_name_is_downloaded_without_code_or_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = use_hub(monkeypatch, tmp_path)
    assert resolve_model("owner/model") == tmp_path
    assert resolve_model("owner/model@v1") == tmp_path
    (repository, options), (_, with_revision) = hub.calls
    assert repository == "owner/model"
    assert options["revision"] is None
    assert with_revision["revision"] == "v1"
    chosen = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.model",
                "merges.txt",
                "chat_template.jinja",
                "modeling_own.py",
                "pytorch_model.bin",
                "original/model.safetensors",
                "training_args.pt",
                "README.md",
            ],
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        )
    )
    assert chosen == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (http_error(errors.GatedRepoError, "403"), CheckpointError, "gated"),
        (http_error(errors.RevisionNotFoundError, "404"), CheckpointError, "no revision"),
        (http_error(errors.RepositoryNotFoundError, "404"), CheckpointError, "no Hub model"),
        (errors.LocalEntryNotFoundError("nothing cached"), OfflineError, "not in the local cache"),
        (errors.OfflineModeIsEnabled("offline"), OfflineError, "not in the local cache"),
        (http_error(errors.HfHubHTTPError, "502 bad gateway"), OfflineError, "502"),
        (errors.HFValidationError("too long"), CheckpointError, "not a Hub name"),
        (ValueError("an URI of\ndatasets"), CheckpointError, "an URI of datasets"),
        (errors.HTTPError("Name or service not known"), OfflineError, "cannot be reached"),
        (http_error(errors.BadRequestError, "400"), OfflineError, "did not deliver"),
        (ConnectionError("no route"), OfflineError, "no route"),
        (OSError(28, "No space left on device"), OfflineError, "No space left"),
        (RuntimeError("data processing error"), OfflineError, "data processing"),
    ],
)
def test_what_went_wrong_on_the_hub_is_said(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[CheckpointError],
    message: str,
) -> None:
    use_hub(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model("owner/model")
    assert type(caught.value) is expected
    assert caught.value.hint
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (http_error(errors.RepositoryNotFoundError, "404"), "no Hub model"),
        (http_error(errors.RevisionNotFoundError, "404"), "no revision"),
        (errors.HFValidationError("too long"), "not a Hub name"),
    ],
)
def test_what_the_hubs_file_system_did_not_find_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, message: str
) -> None:
    error = FileNotFoundError("owner/model")
    error.__cause__ = cause
    use_hub(monkeypatch, errors.LocalEntryNotFoundError("not cached"))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FakeHub(error))
    with pytest.raises(CheckpointError, match=message), open_headers("owner/model"):
        pass


def test_headers_of_a_hub_model_need_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, errors.LocalEntryNotFoundError("not cached"))
    away = FakeHub(errors.HTTPError("no such host"))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", away)
    with pytest.raises(OfflineError, match="no folder 'models/mine'"), open_headers("models/mine"):
        pass


def test_a_name_that_the_hub_refuses_is_said_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_hub(monkeypatch, errors.HFValidationError("no --"))
    with pytest.raises(CheckpointError, match="not a Hub name"), open_headers("a--b/c"):
        pass


def test_a_folder_that_cannot_be_looked_into_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot look into the folder"):
        resolve_model("a" * 300)


def test_a_cached_model_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    download = huggingface_hub.snapshot_download

    def download_offline(name: str, **options: Any) -> str:
        return download(name, cache_dir=tmp_path, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_offline)
    assert resolve_model("owner/model") == snapshot
    with pytest.raises(OfflineError):
        resolve_model("owner/other")


@pytest.mark.parametrize(
    "name", ["", "nowhere", "./nowhere", "/nowhere", "a/b/c", "two words", "-x"]
)
def test_a_missing_folder_is_not_looked_up_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub = use_hub(monkeypatch, AssertionError("the Hub was asked"))
    with pytest.raises(CheckpointError, match="no folder"):
        resolve_model(name)
    with pytest.raises(CheckpointError, match="no folder"), open_headers(name):
        pass
    assert not hub.calls


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(file))


def test_the_demo_is_part_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="demo model is not part"):
        resolve_model("demo")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_model("demo") == tmp_path / "demo"


class FakeHubFiles:
    """Stands in for `HfFileSystem`: serves a folder, and remembers how many bytes it gave away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_given = 0

    def ls(self, root: str, *, detail: bool) -> list[dict[str, Any]]:
        return [
            {"name": f"{root}/{path.name}", "size": path.stat().st_size}
            for path in sorted(self.folder.iterdir())
        ]

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        data = (self.folder / path.rpartition("/")[2]).read_bytes()[start:end]
        self.bytes_given += len(data)
        return data


def test_headers_of_a_hub_model_come_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"w": torch.zeros(1 << 20), "v": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.bin").write_bytes(b"not fetched")
    hub = FakeHubFiles(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: hub)
    use_hub(monkeypatch, http_error(errors.LocalEntryNotFoundError, "not cached"))
    with open_headers("owner/model") as folder:
        index = CheckpointIndex.open(folder)
        assert index["w"].shape == (1 << 20,)
        assert not (folder / "weights.bin").exists()
    assert hub.bytes_given < 1000
    assert not folder.exists()


def test_headers_of_a_cached_hub_model_are_read_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    hub = use_hub(monkeypatch, tmp_path)
    with open_headers("owner/model@v1") as folder:
        assert folder == tmp_path
    assert hub.calls == [("owner/model", {"revision": "v1", "local_files_only": True})]
