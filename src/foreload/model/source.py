"""Turn what a user typed into a folder with a checkpoint.

Three things can be named: `demo` (the small model inside the package), a local folder, or a model
on the Hugging Face Hub. Only safetensors, JSON and tokenizer files are ever downloaded; nothing
from a repository is executed.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from foreload.errors import CheckpointError, OfflineError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ALLOW_PATTERNS", "DEMO_NAME", "open_headers", "resolve_model"]

DEMO_NAME = "demo"
ALLOW_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
)
# repositories such as openai/gpt-oss-20b carry the same weights again in these folders
IGNORE_PATTERNS = ("original/*", "metal/*", "onnx/*", "*.pth", "*.pt", "*.bin")

_MOST_HEADER_BYTES = 100_000_000

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(name: str) -> Path:
    """Give the folder of the checkpoint called `name`, downloading it where needed.

    Args:
        name: `demo`, a folder, or a Hub name such as `Qwen/Qwen3-30B-A3B`, optionally followed by
            `@revision`.

    Returns:
        A folder that holds `config.json`.

    Raises:
        CheckpointError: No such folder or repository, or access to it was refused.
        OfflineError: The Hub cannot be reached and the model is not in the cache.
    """
    local = _find_local(name)
    return _download(*_parse_hub_name(name)) if local is None else local


@contextmanager
def open_headers(name: str) -> Iterator[Path]:
    """Give a folder to read configuration and headers from; weights are not downloaded.

    For a Hub model that is not in the cache the folder is temporary: its safetensors files have
    their true size and header, and holes in place of weights.

    Args:
        name: As for `resolve_model`.

    Raises:
        CheckpointError: No such folder or repository, or access to it was refused.
        OfflineError: The Hub cannot be reached and the model is not in the cache.
    """
    local = _find_local(name)
    if local is not None:
        yield local
        return
    repository, revision = _parse_hub_name(name)
    with _translated_errors(repository, revision):
        cached = _find_cached(repository, revision)
    if cached is not None:
        yield cached
        return
    with TemporaryDirectory(prefix="foreload-") as folder:
        with _translated_errors(repository, revision):
            _fetch_headers(repository, revision, Path(folder))
        yield Path(folder)


def _find_local(name: str) -> Path | None:
    if name == DEMO_NAME:
        return _find_demo()
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot look into the folder {name!r}: {error}", hint="give a folder you may read"
        ) from error
    if is_file:
        raise CheckpointError(
            f"{name} is a file", hint="give the folder that holds config.json and this file"
        )
    return folder if name and is_folder else None


def _parse_hub_name(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    if not _HUB_NAME.fullmatch(repository):
        raise CheckpointError(
            f"no folder {name!r}, and it cannot be the name of a Hub model",
            hint="give an existing folder, demo, or a Hub name such as Qwen/Qwen3-30B-A3B",
        )
    return repository, revision or None


def _find_cached(repository: str, revision: str | None) -> Path | None:
    """Give the cached snapshot, if all its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _fetch_headers(repository: str, revision: str | None, folder: Path) -> None:
    """Fetch the small files whole, and of each safetensors file its header."""
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    root = repository if revision is None else f"{repository}@{revision}"
    for entry in hub.ls(root, detail=True):
        path = str(entry["name"])
        target = folder / path.rpartition("/")[2]
        if path.endswith(".json"):
            target.write_bytes(hub.cat_file(path))
        elif path.endswith(".safetensors"):
            size = int(entry["size"])
            length = int.from_bytes(hub.cat_file(path, start=0, end=8), "little")
            end = min(8 + length, _MOST_HEADER_BYTES, size)
            with target.open("wb") as file:
                file.write(hub.cat_file(path, start=0, end=end))
                file.truncate(size)


def _find_demo() -> Path:
    folder = Path(str(resources.files("foreload").joinpath(DEMO_NAME)))
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "the demo model is not part of this installation",
            hint="install foreload from its wheel, or give a folder or a Hub name",
        )
    return folder


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _translated_errors(repository, revision):
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(ALLOW_PATTERNS),
                ignore_patterns=list(IGNORE_PATTERNS),
            )
        )


@contextmanager
def _translated_errors(repository: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    # RuntimeError is what the Hub's transfer library raises.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _translate(error, repository, revision) from error


def _translate(error: Exception, repository: str, revision: str | None) -> CheckpointError:
    """Say for users what the Hub's library, or its HTTP client, has to say."""
    from huggingface_hub import errors

    said = " ".join(str(error).split())
    # Its file system makes one error of all that was not found; the cause tells which.
    match error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error:
        case errors.GatedRepoError():
            return CheckpointError(
                f"{repository} is gated: its owner asks for an agreement first",
                hint=f"accept it at https://huggingface.co/{repository}, then set HF_TOKEN",
            )
        case errors.RevisionNotFoundError():
            return CheckpointError(
                f"{repository} has no revision {revision!r}",
                hint="leave out @revision for the newest",
            )
        case errors.RepositoryNotFoundError():
            return CheckpointError(
                f"no folder and no Hub model is called {repository!r}",
                hint="check the spelling; a private model needs HF_TOKEN",
            )
        case ValueError() as refusal if not isinstance(refusal, errors.HTTPError):
            return CheckpointError(
                f"no folder {repository!r}, and it is not a Hub name: {said}",
                hint="give an existing folder, or a Hub name such as Qwen/Qwen3-30B-A3B",
            )
    if isinstance(error, errors.HfHubHTTPError):
        return OfflineError(
            f"the Hub did not deliver {repository}: {said}",
            hint="try again later; a finished part of the download is kept",
        )
    # An HTTP error that is not the Hub's answer: there was none.
    is_away = (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    if isinstance(error, is_away):
        return OfflineError(
            f"no folder {repository!r}; as a Hub model it is not in the local cache, and the Hub "
            "cannot be reached",
            hint="check the spelling of a folder; for a Hub model connect once to download it "
            "(unset HF_HUB_OFFLINE)",
        )
    return OfflineError(
        f"{repository} could not be downloaded: {said}",
        hint="check the connection and the free space in HF_HOME",
    )
