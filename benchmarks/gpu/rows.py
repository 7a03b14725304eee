"""Rows of results: what they were measured with, and what becomes of one that breaks."""

from __future__ import annotations

import json
import os
import platform
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

Row = dict[str, Any]


def describe_run() -> Row:
    """Gives what a result was measured with; the commit as the environment's COMMIT has it."""
    packages = ("torch", "transformers", "triton", "accelerate")
    return {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "commit": os.environ.get("COMMIT"),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Gives a row with what was measured, or with what broke: the next rows are worth having."""
    try:
        return {**row, **measure()}
    except Exception as error:
        return broken(row, error)


def or_broken(row: Row, rows: Iterator[Row]) -> Iterator[Row]:
    """Gives rows, and one with what broke where something does."""
    try:
        yield from rows
    except Exception as error:
        yield show(broken(row, error))


def broken(row: Row, error: Exception) -> Row:
    """Gives a row with what broke."""
    return failed(row, note(error))


def note(error: Exception) -> str:
    """Prints an error and gives its text: it would keep what every frame it came through held."""
    traceback.print_exception(error)
    return repr(error)


def failed(row: Row, error: str) -> Row:
    """Gives a row with the text of what broke."""
    return {**row, "error": error, "is_fine": False}


def show(row: Row) -> Row:
    """Prints a row as it comes."""
    print(json.dumps(row), flush=True)
    return row


def compare(found: Tensor, wanted: Tensor, *, tolerance: float = 1e-3) -> Row:
    """Compares logits (T, V) with those wanted, in deviations of these.

    Other orders of sums, through every layer: in float32 a mean gap of a thousandth is too much, in
    bfloat16 one of 15. Right arms have less than 7 there, and a layer of random weights whose
    experts are all wrong gives 50.
    """
    found, wanted = found.float(), wanted[: len(found)].float()
    gap, scale = (found - wanted).abs(), float(wanted.std())
    return {
        "largest_gap": float(gap.max()) / scale,
        "mean_gap": float(gap.mean()) / scale,
        "other_likeliest": int((found.argmax(-1) != wanted.argmax(-1)).sum()),
        "is_fine": bool(gap.mean() < tolerance * scale),
    }
