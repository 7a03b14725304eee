"""`foreload chat`: turns, commands, and what ends them."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from foreload import Engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHORT = ("--max-new-tokens", "6")


def test_a_conversation_keeps_its_turns(call: Callable[..., Any], chat_checkpoint: Path) -> None:
    words = ("chat", chat_checkpoint, *SHORT, "--json", "--system", "Be brief.")
    result = call(*words, input="add two\n\nand now three\n")
    assert result.exit_code == 0, result.stderr
    talk = json.loads(result.stdout)
    roles = [message["role"] for message in talk["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert talk["messages"][3]["content"] == "and now three"
    assert len(talk["stats"]) == 2
    assert talk["messages"][2]["content"] in result.stderr
    with Engine.from_pretrained(chat_checkpoint) as engine:
        answer = engine.generate(talk["messages"][:4], max_new_tokens=6)
    assert talk["messages"][4]["content"] == answer.text


def test_answers_go_to_stdout_and_prompts_to_stderr(
    call: Callable[..., Any], chat_checkpoint: Path
) -> None:
    result = call("chat", chat_checkpoint, *SHORT, input="hello\n/exit\nnever asked\n")
    assert result.exit_code == 0, result.stderr
    with Engine.from_pretrained(chat_checkpoint) as engine:
        answer = engine.generate([{"role": "user", "content": "hello"}], max_new_tokens=6)
    assert result.stdout == answer.text + "\n"
    assert result.stderr.count("> ") == 2
    assert "6 tokens (length)" in result.stderr


def test_commands(call: Callable[..., Any], chat_checkpoint: Path) -> None:
    lines = "hello\n/reset\n/help\n/dance\nagain\n/exit\n"
    result = call("chat", chat_checkpoint, *SHORT, "--json", input=lines)
    talk = json.loads(result.stdout)
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant"]
    assert talk["messages"][0]["content"] == "again"
    assert "the conversation is forgotten" in result.stderr
    assert "there is no /dance" in result.stderr


def test_a_system_message_that_the_template_refuses_is_told_before_the_first_question(
    call: Callable[..., Any], chat_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "without"
    shutil.copytree(chat_checkpoint, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    path.write_text(json.dumps(settings | {"chat_template": refusing + settings["chat_template"]}))
    result = call("chat", folder, *SHORT, "--system", "Be brief.", input="hello\n")
    assert result.exit_code == 1
    assert "no system role" in result.stderr
    assert "leave out --system" in result.stderr
    assert "> " not in result.stderr
    assert call("chat", folder, *SHORT, input="hello\n").exit_code == 0


def test_two_slashes_begin_a_message(call: Callable[..., Any], chat_checkpoint: Path) -> None:
    result = call("chat", chat_checkpoint, *SHORT, "--json", input="//reset\n")
    assert json.loads(result.stdout)["messages"][0]["content"] == "/reset"


def test_a_full_context_is_told_with_what_helps(
    call: Callable[..., Any], chat_checkpoint: Path
) -> None:
    lines = "add two numbers\n" + "add " * 30 + "\n"
    result = call("chat", chat_checkpoint, "--context", "40", "--json", input=lines)
    assert result.exit_code == 0, result.stderr
    assert "the context is full: /reset forgets the conversation" in result.stderr
    # The next question does not fit behind it.
    assert "error: the prompt has" in result.stderr
    assert "where the conversation has become too long" in result.stderr
    assert len(json.loads(result.stdout)["messages"]) == 2


def test_a_second_ctrl_c_leaves_what_was_said(
    call: Callable[..., Any], chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello"])

    def read() -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    result = call("chat", chat_checkpoint, *SHORT, "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["messages"][0]["content"] == "hello"


def test_a_line_that_is_no_text_does_not_end_the_conversation(
    call: Callable[..., Any], chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter([b"\xff\xfe", b"hello", b"/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines).decode())
    result = call("chat", chat_checkpoint, *SHORT, "--json")
    assert result.exit_code == 0, result.stderr
    assert "this is no text" in result.stderr
    assert json.loads(result.stdout)["messages"][-2]["content"] == "hello"


def test_without_a_template_it_suggests_generate(
    call: Callable[..., Any], checkpoint: Path
) -> None:
    result = call("chat", checkpoint, input="hello\n")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr
    assert "foreload generate" in result.stderr


def test_a_failed_answer_does_not_end_the_conversation(
    call: Callable[..., Any], chat_checkpoint: Path
) -> None:
    question = "add " * 60_000
    result = call("chat", chat_checkpoint, *SHORT, "--json", input=f"{question}\nhello\n")
    assert result.exit_code == 0, result.stderr
    assert "error: the prompt has" in result.stderr
    assert json.loads(result.stdout)["messages"][0]["content"] == "hello"


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_answer_only(
    call: Callable[..., Any], chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Engine.forward
    calls = []

    def interrupt(engine: Engine, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(engine, *arguments)

    monkeypatch.setattr(Engine, "forward", interrupt)
    result = call("chat", chat_checkpoint, *SHORT, "--json", input="hello\nhello\n")
    assert result.exit_code == 0, result.stderr
    talk = json.loads(result.stdout)
    assert [stats["num_output_tokens"] for stats in talk["stats"]] == [3, 6]
    assert "3 tokens (cancelled)" in result.stderr
