"""Every error says what to do about it, and can be caught as one kind."""

from __future__ import annotations

import inspect
import traceback

import pytest

import foreload
from foreload import errors
from foreload.errors import CapacityError, ForeloadError, MissingExtraError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_a_foreload_error_and_public(cls: type) -> None:
    assert issubclass(cls, ForeloadError)
    assert getattr(foreload, cls.__name__) is cls


def test_the_tree_is_the_one_in_the_docstring() -> None:
    drawn = {
        line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "──" in line
    }
    assert drawn | {"ForeloadError"} == {cls.__name__ for cls in CLASSES}
    assert issubclass(errors.OfflineError, errors.CheckpointError)


def test_the_hint_is_shown_below_the_message() -> None:
    error = ForeloadError("it broke", hint="mend it")
    assert str(error) == "it broke"
    assert error.hint == "mend it"
    shown = "".join(traceback.format_exception(error))
    assert shown.endswith("it broke\nhint: mend it\n")


def test_without_a_hint_nothing_is_added() -> None:
    error = ForeloadError("it broke")
    assert error.hint is None
    assert not hasattr(error, "__notes__")


def test_a_capacity_error_names_bytes_and_setting() -> None:
    error = CapacityError("no room", needed_bytes=4096, available_bytes=12, setting="memory")
    assert str(error) == "no room: 4,096 bytes needed, 12 available"
    assert (error.needed_bytes, error.available_bytes, error.setting) == (4096, 12, "memory")
    assert "set memory to at least 4,096 bytes" in str(error.hint)


def test_a_missing_extra_names_the_install_line() -> None:
    error = MissingExtraError("matplotlib", "plots")
    assert "matplotlib" in str(error)
    assert error.hint == "pip install 'foreload[plots]'"
