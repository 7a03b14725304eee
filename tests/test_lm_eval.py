"""The harness gets what generation would give: exact contexts, answers under the policy."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from foreload import ConfigError, Engine, MissingExtraError
from foreload.evaluate import prefill_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "examples" / "lm_eval"
SPECULATE = {"policy": "speculate", "predictor": "lookahead"}
CONTEXT, CONTINUATION = "the cat sat on", " the mat, then the rat"


@pytest.fixture
def adapter() -> Any:
    """The module, where the harness is installed."""
    pytest.importorskip("lm_eval", reason="needs the extra: ./scripts/install dev,lm-eval")
    return importlib.import_module("foreload.lm_eval")


@pytest.fixture
def make_lm(adapter: Any, open_engine: Callable[..., Engine]) -> Callable[..., Any]:
    def make(limits: dict[str, int] | None = None, **settings: Any) -> Any:
        return adapter.ForeloadLM(open_engine(**settings), **(limits or {}))

    return make


def ask(*args: Any) -> Any:
    """Make a request as the harness does."""
    return SimpleNamespace(args=args)


def pair(lm: Any) -> tuple[list[int], list[int]]:
    whole = lm.tok_encode(CONTEXT + CONTINUATION)
    cut = len(lm.tok_encode(CONTEXT))
    assert len(whole) - cut > 3
    return whole[:cut], whole[cut:]


def log_shares(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Give the log-probability of every token after the first, from one forward."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    return logs[:-1].gather(-1, ids[0, 1:, None])[:, 0]


def test_without_the_harness_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "foreload.lm_eval", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError) as caught:
        importlib.import_module("foreload.lm_eval")
    assert caught.value.hint == "pip install 'foreload[lm-eval]'"


def test_a_continuations_likelihood_is_that_of_transformers(
    make_lm: Callable[..., Any], tiny_model: PreTrainedModel
) -> None:
    lm = make_lm()
    context, rest = pair(lm)
    ((score, is_greedy),) = lm.loglikelihood([ask(CONTEXT, CONTINUATION)], disable_tqdm=True)
    wanted = log_shares(tiny_model, context + rest)[-len(rest) :].sum()
    assert score == pytest.approx(float(wanted), abs=1e-3)
    assert not is_greedy


def test_what_the_model_would_write_itself_is_greedy(make_lm: Callable[..., Any]) -> None:
    lm = make_lm()
    context, _ = pair(lm)
    written = lm.engine.generate(context, max_new_tokens=4).token_ids
    answers = lm._loglikelihood_tokens(
        [(None, context, written), (None, context, [*written[:-1], written[-1] ^ 1])],
        disable_tqdm=True,
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_a_policy_acts_on_answers_as_in_decoding(make_lm: Callable[..., Any]) -> None:
    lm = make_lm(**SPECULATE)
    context, rest = pair(lm)
    ((score, _),) = lm.loglikelihood([ask(CONTEXT, CONTINUATION)], disable_tqdm=True)
    assert lm.engine.metrics.num_speculated > 0
    cache, logits = prefill_exactly(lm.engine, context)
    wanted = 0.0
    for place, token in enumerate(rest):
        wanted += float(logits.double().log_softmax(-1)[token])
        if place < len(rest) - 1:
            logits = lm.engine.forward(torch.tensor([[token]]), cache)
    assert score == wanted
    ((exact, _),) = make_lm().loglikelihood([ask(CONTEXT, CONTINUATION)], disable_tqdm=True)
    assert score != exact


def test_the_first_token_of_an_answer_is_exact(make_lm: Callable[..., Any]) -> None:
    answers = [
        make_lm(**settings)._loglikelihood_tokens([(None, [5], [7])], disable_tqdm=True)
        for settings in (SPECULATE, {})
    ]
    assert answers[0] == answers[1]


def test_a_context_that_answers_share_is_read_once(make_lm: Callable[..., Any]) -> None:
    lm = make_lm()
    choices = ["at the", " on the mat", "rat"]
    requests = [ask(CONTEXT, choice) for choice in choices]
    together = lm.loglikelihood(requests, disable_tqdm=True)
    num_fed = sum(len(lm.tok_encode(CONTEXT + choice)) - 1 for choice in choices)
    num_context = len(lm.tok_encode(CONTEXT))
    assert lm.engine.metrics.num_steps == num_fed - 3 * num_context + 1
    alone = [lm.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert together == alone


def test_an_empty_context_is_the_first_token(
    make_lm: Callable[..., Any], tiny_model: PreTrainedModel
) -> None:
    lm = make_lm()
    assert lm.prefix_token_id == lm.tokenizer.bos_token_id
    ((score, _),) = lm.loglikelihood([ask("", CONTEXT)], disable_tqdm=True)
    whole = [lm.prefix_token_id, *lm.tok_encode(CONTEXT)]
    assert score == pytest.approx(float(log_shares(tiny_model, whole).sum()), abs=1e-3)
    ((blank, _),) = lm.loglikelihood([ask(" ", "cat")], disable_tqdm=True)
    assert blank < 0


def test_a_context_is_cut_from_the_left(make_lm: Callable[..., Any]) -> None:
    lm = make_lm({"max_length": 8})
    long, short = list(range(10, 40)), list(range(35, 40))
    answers = lm._loglikelihood_tokens(
        [(None, long, [7, 8, 9, 10]), (None, short, [7, 8, 9, 10])], disable_tqdm=True
    )
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="9 tokens does not fit"):
        lm._loglikelihood_tokens([(None, short, list(range(9)))], disable_tqdm=True)


def test_a_whole_text_is_scored_from_its_first_token_on(
    make_lm: Callable[..., Any], tiny_model: PreTrainedModel
) -> None:
    text = CONTEXT + CONTINUATION
    lm = make_lm()
    (score,) = lm.loglikelihood_rolling([ask(text)], disable_tqdm=True)
    whole = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert score == pytest.approx(float(log_shares(tiny_model, whole).sum()), abs=1e-3)


def test_a_text_beyond_the_context_is_scored_in_windows(
    make_lm: Callable[..., Any], tiny_model: PreTrainedModel
) -> None:
    lm = make_lm({"max_length": 8})
    text = (CONTEXT + CONTINUATION) * 2
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert 17 < len(ids) < 25
    (score,) = lm.loglikelihood_rolling([ask(text)], disable_tqdm=True)
    rest = len(ids) - 17
    wanted = log_shares(tiny_model, ids[:9]).sum() + log_shares(tiny_model, ids[8:17]).sum()
    wanted += log_shares(tiny_model, ids[-9:])[-rest:].sum()
    assert score == pytest.approx(float(wanted), abs=1e-3)


def test_completions_are_the_engines(make_lm: Callable[..., Any]) -> None:
    lm = make_lm(**SPECULATE)
    wishes = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}
    (text,) = lm.generate_until([ask(CONTEXT, wishes)], disable_tqdm=True)
    assert text == lm.engine.generate(CONTEXT, max_new_tokens=6).text
    assert wishes["until"] == ["zzz"]
    assert len(text) > 1
    stopped = lm.generate_until([ask(CONTEXT, {**wishes, "until": text[1]})], disable_tqdm=True)
    assert stopped == [text[: text.index(text[1])]]


def test_sampling_can_be_repeated_and_differs_between_requests(
    make_lm: Callable[..., Any],
) -> None:
    lm = make_lm({"max_gen_toks": 8})
    requests = [ask(CONTEXT, {"temperature": 3.0})] * 2
    first, second = lm.generate_until(requests, disable_tqdm=True)
    assert first != second
    assert lm.generate_until(requests, disable_tqdm=True) == [first, second]


def test_a_prompt_is_cut_to_leave_room(make_lm: Callable[..., Any]) -> None:
    lm = make_lm({"max_length": 16})
    context = CONTEXT * 4
    (text,) = lm.generate_until([ask(context, {"max_gen_toks": 6})], disable_tqdm=True)
    assert text == lm.engine.generate(lm.tok_encode(context)[-10:], max_new_tokens=6).text
    with pytest.raises(ConfigError, match="max_gen_toks=16 leaves no room"):
        lm.generate_until([ask(context, {"max_gen_toks": 16})], disable_tqdm=True)


def test_what_cannot_be_done_is_said(
    make_lm: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm()
    with caplog.at_level(logging.WARNING, logger="foreload"):
        lm.generate_until([ask(CONTEXT, {"max_gen_toks": 1, "num_beams": 4})], disable_tqdm=True)
    assert "num_beams" in caplog.text


def test_a_first_token_that_is_spelled_out_is_not_doubled(make_lm: Callable[..., Any]) -> None:
    lm = make_lm()
    plain = lm.tokenizer

    class AddsFirstToken:
        bos_token, bos_token_id = plain.bos_token, plain.bos_token_id

        def __call__(self, text: str, add_special_tokens: bool, **settings: Any) -> Any:
            ids = plain(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    lm.tokenizer = AddsFirstToken()
    first = plain.bos_token_id
    for text in ("the cat", "<bos>the cat"):
        assert lm.tok_encode(text)[:2] == [first, plain("the")["input_ids"][0]]
    assert first not in lm.tok_encode("the cat", add_special_tokens=False)


def test_conversations_are_written_by_the_template(make_lm: Callable[..., Any]) -> None:
    lm = make_lm()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        talk = [{"role": "user", "content": "hello"}]
        assert lm.apply_chat_template(talk) == "[user]hello[assistant]"
        talk.append({"role": "assistant", "content": "wel"})
        started = lm.apply_chat_template(talk, add_generation_prompt=False)
        assert started == "[user]hello[assistant]wel"
    finally:
        lm.tokenizer.chat_template = None


def test_it_refuses_what_makes_no_sense(
    adapter: Any, open_engine: Callable[..., Engine], tiny_checkpoint: Path
) -> None:
    engine = open_engine()
    with pytest.raises(ConfigError, match="has its settings: eviction"):
        adapter.ForeloadLM(engine, eviction="lru")
    with pytest.raises(ConfigError, match="unknown setting"):
        adapter.ForeloadLM(str(tiny_checkpoint), expert_memori="25%")
    engine.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        adapter.ForeloadLM(engine)


@pytest.fixture
def run_tasks(
    adapter: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Run the repository's tasks as the harness's command does, on its first documents."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    opened: list[Engine] = []
    from_pretrained = Engine.from_pretrained

    def open_one(*args: Any, **settings: Any) -> Engine:
        opened.append(from_pretrained(*args, **settings))
        return opened[-1]

    # The harness closes nothing.
    monkeypatch.setattr(Engine, "from_pretrained", open_one)

    def run(arguments: str, *tasks: str) -> Any:
        return lm_eval.simple_evaluate(
            model="foreload",
            model_args=f"model={tiny_checkpoint},{arguments}",
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            device="cuda:0",
            limit=3,
            bootstrap_iters=0,
        )

    yield run
    for engine in opened:
        engine.close()


def test_the_harness_runs_every_kind_of_task_under_any_policy(
    run_tasks: Callable[..., Any],
) -> None:
    names = sorted(path.stem for path in TASKS.glob("*.yaml"))
    assert names == ["python_choice", "python_line", "python_text"]
    kinds = {yaml.safe_load((TASKS / f"{name}.yaml").read_text())["output_type"] for name in names}
    assert kinds == {"multiple_choice", "loglikelihood_rolling", "generate_until"}
    reports = {
        policy: run_tasks(f"expert_memory=50%,predictor=lookahead,policy={policy}", *names)
        for policy in ("exact", "speculate", "speculate-when")
    }
    for policy, report in reports.items():
        assert report["config"]["foreload"]["policy"] == policy
        assert report["config"]["foreload"]["device"] == "cpu"
        assert 0 <= report["results"]["python_choice"]["acc,none"] <= 1
        assert 0 <= report["results"]["python_line"]["exact_match,none"] <= 1
        assert report["results"]["python_text"]["bits_per_byte,none"] > 0
    losses = [r["results"]["python_text"]["bits_per_byte,none"] for r in reports.values()]
    assert losses[0] != losses[1]


def test_the_exact_score_of_a_task_is_that_of_transformers(
    run_tasks: Callable[..., Any], tiny_model: PreTrainedModel, make_lm: Callable[..., Any]
) -> None:
    report = run_tasks("expert_memory=50%,predictor=none,eviction=none", "python_text")
    assert report["config"]["foreload"]["predictor"] == "none"
    lm = make_lm()
    lines = (TASKS / "python.jsonl").read_text().splitlines()[:3]
    items = [json.loads(line) for line in lines]
    texts = [item["context"] + item["choices"][item["answer"]] for item in items]
    total = sum(
        float(log_shares(tiny_model, [lm.prefix_token_id, *lm.tok_encode(text)]).sum())
        for text in texts
    )
    num_bytes = sum(len(text.encode()) for text in texts)
    wanted = -total / num_bytes / math.log(2)
    assert report["results"]["python_text"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-4)
