"""Write the reference pages beside this file from the code they describe.

    python docs/reference/generate.py

Options come from the command's own definition, settings and statistics from their dataclasses,
errors and the Python interface from docstrings. Nothing is written down here twice: a page that is
wrong is mended in the code. `tests/test_docs.py` fails while a page is not current.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import foreload
from foreload import errors
from foreload.calibrate import CalibrationReport, calibrate
from foreload.cli import app
from foreload.config import EngineConfig, SamplingConfig
from foreload.decode.chunks import Chunk, GenerationResult
from foreload.engine import Engine
from foreload.evaluate import (
    EvaluationReport,
    Interval,
    TokenQuality,
    bootstrap_interval,
    compare_logits,
    evaluate,
)
from foreload.metrics import Metrics, RequestStats, Timeline
from foreload.recording import RecordingReport, record_trace
from foreload.schedule.governor import RoofPoint
from foreload.trace.read import read_trace
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo
from foreload.trace.simulate import (
    SimulationLimits,
    SimulationResult,
    SimulationSettings,
    simulate,
    simulation_limits,
    wire_limit_s,
)
from foreload.train_estimator import EstimatorReport, train_estimator

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
NOTE = "<!-- written by docs/reference/generate.py: change the code, then run it again -->"
ATTRIBUTE = re.compile(r"(\w+): (.*)")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Cost|Reference):")


def render() -> dict[str, str]:
    """Give every page by file name."""
    pages = {
        "cli.md": [*render_cli()],
        "config.md": [*render_config()],
        "errors.md": [*render_errors()],
        "metrics.md": [*render_metrics()],
        "api.md": [*render_api()],
    }
    return {name: "\n".join([NOTE, "", *lines]).rstrip() + "\n" for name, lines in pages.items()}


def render_cli() -> Iterator[str]:
    """Give the lines of cli.md."""
    command: Any = typer.main.get_command(app)
    yield from ("# The command", "", f"{command.help}", "")
    yield "`foreload --version` prints the version, `foreload VERB --help` a verb's options."
    yield "Exit status: 0 success, 1 an error, 2 wrong usage, 130 interrupted, 141 nobody reads the"
    yield from ("output any more.", "")
    for words, leaf in leaves("foreload", command):
        yield from render_verb(words, leaf)


def leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Give every verb with the words that call it."""
    children = getattr(command, "commands", None)
    if children is None:
        yield words, command
        return
    for name, child in children.items():
        yield from leaves(f"{words} {name}", child)


def render_verb(words: str, leaf: Any) -> Iterator[str]:
    """Give the lines of one verb."""
    arguments = [p for p in leaf.params if not p.opts[0].startswith("-")]
    usage = [_argument(p) for p in arguments]
    yield from (f"## {words}", "", "```text", " ".join([words, "[OPTIONS]", *usage]), "```", "")
    yield from (unwrap(leaf.help), "")
    for parameter in arguments:
        default = "" if parameter.required else f" Default `{parameter.default}`."
        yield f"- `{_argument(parameter).strip('[]')}`: {parameter.help}{default}"
    yield ""
    panels: dict[str, list[Any]] = {}
    for parameter in leaf.params:
        if parameter not in arguments:
            panels.setdefault(parameter.rich_help_panel or "Options", []).append(parameter)
    for panel, options in panels.items():
        yield from (f"| {panel} | value | default | |", "|---|---|---|---|")
        for option in options:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            yield f"| {names} | {_value(option)} | {_default(option)} | {option.help} |"
        yield ""


def _argument(parameter: Any) -> str:
    name: str = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _value(option: Any) -> str:
    if option.is_flag:
        return "flag"
    if isinstance(option.default, Enum):
        return ", ".join(f"`{member.value}`" for member in type(option.default))
    name = str(option.metavar or option.name.upper()).replace("|", "\\|")
    return f"`{name}`"


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    default = option.default.value if isinstance(option.default, Enum) else option.default
    if default in (None, [], ()):
        return ""
    if option.is_flag:
        return "on" if default else "off"
    return f"`{default}`"


def render_config() -> Iterator[str]:
    """Give the lines of config.md."""
    yield from (
        "# Settings",
        "",
        "`Engine.from_pretrained` takes the first table's settings by name, `Engine.generate` and "
        "`Engine.stream` the second's. On the command line they are options, with dashes for "
        "underscores. An unknown name or a value outside its choices is a `ConfigError`.",
        "",
    )
    for cls in (EngineConfig, SamplingConfig):
        yield from (f"## {cls.__name__}", "", unwrap(summary(cls)), "")
        yield from ("| setting | type | default | meaning |", "|---|---|---|---|")
        texts = attributes(cls)
        for field in dataclasses.fields(cls):
            kind = str(field.type).replace("|", "\\|")
            yield f"| `{field.name}` | `{kind}` | `{field.default!r}` | {texts[field.name]} |"
        yield ""
    yield from (
        "`engine.config` holds the settings after `resolution.resolve`: `device`, `dtype`, "
        "`expert_memory` (in bytes: whole slots, and the draft) and `draft` are then values; "
        '`predictor="auto"` and `num_draft_tokens="auto"` stay, because they go on measuring.',
        "",
        "## Sizes",
        "",
        "A size is a number of bytes, a number with a unit (`B`, `kB`, `MB`, `GB`, `TB` by "
        "thousands; `KiB`, `MiB`, `GiB`, `TiB`, `K`, `M`, `G`, `T` by 1024), or a percentage of "
        "all experts' slots, with a draft maybe above 100.",
    )


def render_errors() -> Iterator[str]:
    """Give the lines of errors.md."""
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1]
    yield from ("# Errors", "")
    yield "Every error raised on purpose derives from `foreload.ForeloadError` and has a `hint`,"
    yield "what to do about it, or None. [Troubleshooting](../troubleshooting.md) has them all."
    yield from ("", "```text", inspect.cleandoc(tree), "```", "")
    for name in errors.__all__:
        cls = getattr(errors, name)
        yield from (f"## {name}", "", *body(cls), "")


def render_metrics() -> Iterator[str]:
    """Give the lines of metrics.md."""
    yield from ("# Metrics", "", "Seconds and bytes; rates are between 0 and 1.", "")
    for cls, title in (
        (RequestStats, "RequestStats: one request, `GenerationResult.stats`"),
        (Metrics, "Metrics: counters since the engine was made, `Engine.metrics`"),
    ):
        yield from (f"## {title}", "", "| name | meaning |", "|---|---|")
        for name, text in attributes(cls).items():
            yield f"| `{name}` | {text} |"
        for name, value in vars(cls).items():
            if isinstance(value, property):
                yield f"| `{name}` | {formula(summary(value))} |"
        yield ""
    yield from ("## Timeline: named spans, `Engine.timeline`", "", *methods(Timeline))


def render_api() -> Iterator[str]:
    """Give the lines of api.md."""
    yield from ("# Python", "", "Public names of `foreload`:", "")
    yield from (", ".join(f"`{name}`" for name in foreload.__all__ if name[0] != "_") + ".", "")
    yield "Settings are in [config](config.md), errors in [errors](errors.md), statistics in"
    yield from ("[metrics](metrics.md).", "")
    for cls in (Engine, Chunk, GenerationResult):
        yield from (f"## {cls.__name__}", "", *body(cls), "")
        if cls is Engine:
            yield from methods(cls)
    yield from ("## foreload.calibrate", "", *function("calibrate", calibrate))
    yield from ("### CalibrationReport", "", *body(CalibrationReport), "")
    yield from methods(CalibrationReport, "#### ")
    yield from ("## foreload.train_estimator", "", *function("train_estimator", train_estimator))
    yield from ("### EstimatorReport", "", *body(EstimatorReport), "")
    yield from methods(EstimatorReport, "#### ")
    yield from ("## foreload.evaluate", "", *function("evaluate", evaluate))
    for cls in (EvaluationReport, Interval, TokenQuality):
        yield from (f"### {cls.__name__}", "", *body(cls), "")
    for work in (compare_logits, bootstrap_interval):
        yield from function(work.__name__, work)
    yield from ("## foreload.recording", "", *function("record_trace", record_trace))
    yield from ("### RecordingReport", "", *body(RecordingReport), "")
    yield from ("## foreload.schedule.governor", "")
    yield 'Entries of `engine.stats["governor"]`, see [governor](../concepts/governor.md).'
    yield from ("", "### RoofPoint", "", *body(RoofPoint), "")
    yield from ("## foreload.trace", "", *function("read.read_trace", read_trace))
    for cls in (RoutingTrace, TraceInfo, LayerVisit):
        yield from (f"### record.{cls.__name__}", "", *body(cls), "")
    yield from ("## foreload.trace.simulate", "")
    for work in (simulate, simulation_limits, wire_limit_s):
        yield from function(work.__name__, work)
    for cls in (SimulationSettings, SimulationResult, SimulationLimits):
        yield from (f"### {cls.__name__}", "", *body(cls), "")


def methods(cls: type, heading: str = "### ") -> Iterator[str]:
    """Give the public methods and properties of a class."""
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield from (f"{heading}{cls.__name__}.{name}", "", formula(summary(value)), "")
        elif inspect.isfunction(value) or isinstance(value, classmethod):
            bound = value.__func__ if isinstance(value, classmethod) else value
            yield from function(f"{cls.__name__}.{name}", bound, heading)


def function(name: str, value: Any, heading: str = "### ") -> Iterator[str]:
    """Give a function's signature and docstring."""
    signature = inspect.signature(value)
    kept = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    written = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature.replace(parameters=kept)))
    yield from (f"{heading}{name}", "", "```text", f"{name.split('.')[-1]}{written}", "```", "")
    yield from (*body(value), "")


def body(value: Any) -> Iterator[str]:
    """Turn a Google docstring into Markdown."""
    item = False
    is_section = False
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        if SECTION.fullmatch(line):
            is_section = True
            yield from (f"{line[:-1]}:", "")
        elif (
            is_section
            and (match := ATTRIBUTE.fullmatch(line.strip().lstrip("*")))
            and (not line.startswith("     "))
        ):
            item = True
            yield f"- `{match[1]}`: {match[2]}"
        elif is_section and line.strip():
            yield ("  " if item else "") + line.strip()
        else:
            item = item and bool(line)
            is_section = is_section and not (line and not line.startswith(" "))
            yield line


def summary(value: Any) -> str:
    """Give the first paragraph of a docstring."""
    return inspect.cleandoc(value.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def formula(text: str) -> str:
    """Drop the "Give" that a property's summary begins with."""
    return re.sub(r"^Give,? ", "", text)


def unwrap(text: str) -> str:
    """Join the lines of each paragraph."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def attributes(cls: type) -> dict[str, str]:
    """Give the texts of a docstring's Attributes by name."""
    texts: dict[str, str] = {}
    name = ""
    lines = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    for line in lines:
        if not line.strip():
            break
        match = ATTRIBUTE.fullmatch(line.strip())
        if match and not line.startswith("     "):
            name, texts[match[1]] = match[1], match[2]
        else:
            texts[name] += " " + line.strip()
    return {name: text.replace("|", "\\|") for name, text in texts.items()}


if __name__ == "__main__":
    for page, content in render().items():
        (HERE / page).write_text(content, encoding="utf-8")
