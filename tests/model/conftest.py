"""What several tests of drafts begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from drafting import KINDS, build

from foreload.model.hf import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    """The tiny model, its experts on disk."""
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def folders(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A draft of each kind."""
    found = {kind: tmp_path_factory.mktemp("drafts") / kind for kind in KINDS}
    for kind, folder in found.items():
        build(loaded, folder, kind)
    return found
