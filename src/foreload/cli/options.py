"""The options verbs share, made from the settings they fill in.

Names, defaults and choices are read from `EngineConfig` and `SamplingConfig`: a setting added
there is an option here. Only the help texts are written down.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreload.config import EngineConfig, SamplingConfig, parse_size
from foreload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "DEFAULT_MODEL",
    "ENGINE",
    "HELP",
    "HOST_ENGINE",
    "OUTPUT",
    "PLAIN_ENGINE",
    "SAMPLING",
    "CacheDirOption",
    "ModelArgument",
    "OptionGroup",
    "choice",
    "expand_home",
    "parse_bandwidth",
    "parse_budgets",
    "parse_bytes",
]

HELP = {
    "device": "Where the model computes; auto takes a CUDA device that runs these settings.",
    "dtype": "Element type in memory; auto is the checkpoint's own.",
    "context": "Most tokens of a request, prompt and text; a device keeps memory free for them.",
    "expert_memory": 'Ceiling of the memory for experts: auto, "2GiB", or "25%" of all experts.',
    "host_memory": "Ceiling of the host tier, through which experts get to a device.",
    "orchestration": "Who decides which experts are on the device: the host, or the device.",
    "slot_plan": "Slots per MoE layer on a device: equal, or a trace to plan them from.",
    "predictor": "Who guesses the coming experts; auto takes what pays on this machine.",
    "lookahead_layers": "How many MoE layers ahead to guess.",
    "eviction": "Which expert makes room; none keeps no expert after its use.",
    "num_workers": "Copies in flight at once.",
    "prefill_chunk": "Most prompt tokens per forward.",
    "policy": "Who decides what is executed; all but exact change the text.",
    "confidence": "For speculate-when: share of the routing weight that is waited for.",
    "draft": "Quantised experts that draft tokens; auto uses one that was built already.",
    "num_draft_tokens": "Tokens drafted per round; auto takes what pays.",
    "max_new_tokens": "Most tokens to generate.",
    "temperature": "0 takes the likeliest token.",
    "top_p": "Sample among the likeliest tokens that together reach this probability.",
    "top_k": "Sample among this many likeliest tokens; 0 for all.",
    "seed": "Seed of the sampling.",
    "stop": "Text that ends the generation; may be given several times.",
}

DEFAULT_MODEL = EngineConfig().model


def expand_home(path: Path | None) -> Path | None:
    """Give a path with its "~", which shells leave in --option=~/folder.

    Raises:
        BadParameter: No such user.
    """
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: {error}") from error


ModelArgument = Annotated[
    str,
    typer.Argument(help="Local directory, Hub name (owner/model), or demo.", metavar="MODEL"),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Where calibrations, estimators and drafts are kept.",
        show_default="~/.cache/foreload",
        file_okay=False,
        callback=expand_home,
        rich_help_panel="Engine",
    ),
]

_METAVARS = {
    "context": "auto|N",
    "device": "auto|cpu|cuda[:N]",
    "expert_memory": "auto|SIZE|PERCENT",
    "host_memory": "auto|SIZE|PERCENT",
    "num_draft_tokens": "auto|N",
    "slot_plan": "equal|TRACE",
    "stop": "TEXT",
}


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Options that a verb takes together, as one frozen object.

    Attributes:
        name: The verb's parameter that receives the object.
        make: Dataclass the options fill in.
        parameters: The options.
    """

    name: str
    make: type[Any]
    parameters: tuple[inspect.Parameter, ...]

    def collect(self, values: dict[str, Any]) -> Any:
        """Take the group's options out of `values` and make its object.

        Raises:
            BadParameter: A value makes no sense, whatever the model.
        """
        taken = {parameter.name: values.pop(parameter.name) for parameter in self.parameters}
        plain = {name: v.value if isinstance(v, Enum) else v for name, v in taken.items()}
        try:
            return self.make(**plain)
        except ConfigError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise typer.BadParameter(f"{error}{hint}") from error

    def without(self, *names: str) -> OptionGroup:
        """Copy with some options left to their defaults."""
        kept = tuple(p for p in self.parameters if p.name not in names)
        return OptionGroup(self.name, self.make, kept)


def choice(name: str, choices: Collection[str]) -> Any:
    """Give the annotation of an option that takes one of `choices`."""
    return Enum(name, {value: value for value in choices}, type=str)


def parse_budgets(text: str) -> tuple[float, ...]:
    """Turn percentages of all experts, "10,25%", into shares.

    Raises:
        BadParameter: Something else, or not above 0 and at most 100.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        shares = tuple(float(word.removesuffix("%")) / 100 for word in words)
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise typer.BadParameter(
            f"--budgets {text!r}: give percentages of all experts, above 0 and at most 100, such "
            "as 10,25"
        )
    return shares


def parse_bandwidth(option: str, text: str) -> int:
    """Turn "3.2GB" or "3.2GB/s" into bytes per second.

    Raises:
        BadParameter: Something else.
    """
    return parse_bytes(option, text.strip().removesuffix("/s"))


def parse_bytes(option: str, text: str, whole_bytes: int | None = None) -> int:
    """Turn "3.2GB" into bytes, and a percentage where there is a whole.

    Raises:
        BadParameter: Something else.
    """
    if whole_bytes is None and "%" in text:
        raise typer.BadParameter(f"{option} {text!r}: give bytes, such as 3.2GB")
    try:
        return parse_size(text, whole_bytes=whole_bytes or 1, setting=option)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _group(name: str, make: type[Any], panel: str, skipped: tuple[str, ...] = ()) -> OptionGroup:
    """Make one option per field of a dataclass that has defaults throughout."""
    defaults = make()
    choices: dict[str, tuple[str, ...]] = getattr(make, "CHOICES", {})
    parameters = []
    for field in fields(make):
        if field.name in skipped:
            continue
        default = getattr(defaults, field.name)
        if field.name in choices:
            kind = choice(field.name, choices[field.name])
            default = kind(default)
        elif isinstance(default, tuple):
            kind, default = list[str], list(default)
        else:
            kind = int | None if default is None else type(default)
        option = typer.Option(
            "--" + field.name.replace("_", "-"),
            help=HELP.get(field.name),
            metavar=_METAVARS.get(field.name),
            rich_help_panel=panel,
        )
        parameters.append(_keyword(field.name, Annotated[kind, option], default))
    return OptionGroup(name, make, tuple(parameters))


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _flag(name: str, text: str) -> inspect.Parameter:
    option = typer.Option("--" + name.removeprefix("is_"), help=text, rich_help_panel="Output")
    return _keyword(name, Annotated[bool, option], False)


ENGINE = _group("settings", EngineConfig, "Engine", skipped=("model",))
PLAIN_ENGINE = ENGINE.without("draft", "num_draft_tokens")
"""For verbs that run a text as it is given: there is nothing to draft."""
HOST_ENGINE = PLAIN_ENGINE.without("orchestration", "slot_plan")
"""For verbs that watch what only the host's loop shows."""
SAMPLING = _group("sampling", SamplingConfig, "Sampling")
OUTPUT = (
    _flag("is_json", "Print one JSON object to stdout, everything else to stderr."),
    _flag("is_quiet", "Print results only."),
    _flag("is_debug", "Show tracebacks of errors."),
)
