"""`foreload chat`: a terminal conversation with the model's chat template."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from foreload.cli.options import DEFAULT_MODEL, ENGINE, SAMPLING, CacheDirOption, ModelArgument
from foreload.cli.statistics import config_line, statistics_line
from foreload.cli.streaming import open_engine, stream_answer
from foreload.cli.terminal import Terminal
from foreload.cli.verb import INTERRUPTED, verb
from foreload.config import EngineConfig, SamplingConfig
from foreload.decode.prompt import encode_prompt
from foreload.errors import ConfigError, ForeloadError

__all__ = ["chat"]

_HELP = (
    "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends an answer; a message "
    "that begins with a slash begins with two"
)

SystemOption = Annotated[
    str | None, typer.Option(help="System message the conversation opens with.")
]


@verb(ENGINE, SAMPLING)
def chat(
    terminal: Terminal,
    settings: EngineConfig,
    sampling: SamplingConfig,
    model: ModelArgument = DEFAULT_MODEL,
    system: SystemOption = None,
    cache_dir: CacheDirOption = None,
) -> None:
    """Talk to a model in the terminal.

    Ctrl-C ends an answer, not the conversation; /exit or Ctrl-D ends it. With --json the
    conversation goes to stderr, and the object holds its messages and statistics.
    """
    with open_engine(terminal, settings.with_values(model=model), cache_dir) as engine:
        if not getattr(engine.tokenizer, "chat_template", None):
            raise ConfigError(
                f"{model} has no chat template: it completes text, it does not converse",
                hint=f"try `foreload generate {model} -p ...`",
            )
        opening = [{"role": "system", "content": system}] if system else []
        _check_template(engine, opening)
        terminal.note(config_line(engine))
        terminal.note(_HELP)
        talk = _Conversation(terminal, engine, sampling, opening)
        status = talk.run()
        config = engine.config.to_dict() | {"sampling": asdict(sampling)}
    terminal.print_json({"messages": talk.messages, "stats": talk.stats, "config": config})
    if status:
        raise typer.Exit(status)


def _check_template(engine: Any, opening: list[dict[str, str]]) -> None:
    """Refuse now what the template would refuse once a question is asked."""
    first = [*opening, {"role": "user", "content": "-"}]
    try:
        encode_prompt(first, engine.tokenizer, engine.vocab_size)
    except ConfigError as error:
        hint = "some templates have no system message: leave out --system"
        raise ConfigError(str(error), hint=hint if opening else error.hint) from error


class _Conversation:
    def __init__(
        self,
        terminal: Terminal,
        engine: Any,
        sampling: SamplingConfig,
        opening: list[dict[str, str]],
    ) -> None:
        self._terminal = terminal
        self._engine = engine
        self._sampling = sampling
        self._opening = opening
        self.messages = list(opening)
        self.stats: list[dict[str, Any]] = []

    def run(self) -> int:
        """Take turns until the user has had enough; give the exit status."""
        try:
            self._take_turns()
        except KeyboardInterrupt:
            # What was said so far is worth having.
            return INTERRUPTED
        return 0

    def _take_turns(self) -> None:
        while (text := self._ask()) is not None:
            match text.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case message if message.startswith("//"):
                    self._answer(message[1:])
                case "/reset":
                    self.messages = list(self._opening)
                    self._say("the conversation is forgotten\n")
                case "/help":
                    self._say(_HELP + "\n")
                case command if command.startswith("/") and " " not in command:
                    self._say(f"there is no {command}: {_HELP}\n")
                case _:
                    self._answer(text)

    def _ask(self) -> str | None:
        """Read the user's next line; None at the end. A second Ctrl-C in a row is raised."""
        is_second = False
        while True:
            try:
                # input() would put its own prompt on stdout.
                self._terminal.err.print("> ", style="bold cyan", end="")
                return input()
            except EOFError:
                self._say("\n")
                return None
            except UnicodeDecodeError as error:
                self._terminal.error(f"this is no text: {error}", "write it in UTF-8")
            except KeyboardInterrupt:
                if is_second:
                    raise
                is_second = True
                self._say("\n" + _HELP + "\n")

    def _answer(self, text: str) -> None:
        prompt = [*self.messages, {"role": "user", "content": text}]
        show = self._say if self._terminal.is_json else self._terminal.write
        try:
            result = stream_answer(self._engine, prompt, self._sampling, show)
        except ForeloadError as error:
            # The engine stays usable: the question is dropped, the conversation goes on.
            is_full = bool(self.messages) and isinstance(error, ConfigError)
            forget = "where the conversation has become too long, /reset forgets it"
            hint = "; ".join(filter(None, (error.hint, forget if is_full else None)))
            self._terminal.error(str(error), hint or None)
            return
        show("\n")
        self.messages = [*prompt, {"role": "assistant", "content": result.text}]
        self.stats.append(result.stats.to_dict())
        policy = self._engine.config.policy
        self._terminal.note(statistics_line(result.stats, result.finish_reason, policy))
        if result.finish_reason == "context":
            self._terminal.note("the context is full: /reset forgets the conversation")

    def _say(self, text: str) -> None:
        self._terminal.err.print(text, end="", markup=False, soft_wrap=True)
