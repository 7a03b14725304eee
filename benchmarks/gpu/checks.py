"""Checks on small models: captured decoding beside transformers' own, and what is drawn."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu.models import load_resident, open_engine, shares_of
from gpu.rows import attempt, compare, show
from gpu.settings import DEVICE, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from foreload import Engine
    from gpu.rows import Row
    from gpu.settings import Settings


def equivalence(settings: Settings) -> Iterator[Row]:
    """Compares captured decoding with transformers' resident model, token by token."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo
    from foreload.model.source import resolve_model

    with tempfile.TemporaryDirectory() as folder:
        models = {"demo": resolve_model("demo")}
        for family in settings.families:
            models[family] = zoo.save_family(family, Path(folder) / family, torch.float32).path
        for name, path in models.items():
            ids, wanted = resident_logits(path, settings.num_tokens)
            for share in shares_of(path, settings.shares):
                row = {"model": name, "share": share}
                yield show(attempt(row, functools.partial(_decode, path, share, ids, wanted)))


def _decode(path: Path, share: float, ids: list[int], wanted: Tensor) -> Row:
    """Runs one model with one share of its experts resident."""
    with open_engine(path, share, dtype="float32", predictor="lookahead") as engine:
        logits, is_captured = step_through(engine, ids)
        row = compare(torch.stack(logits), wanted)
        row["is_fine"] = row["is_fine"] and is_captured
        return {"is_captured": is_captured, "hit_rate": engine.stats["hit_rate"], **row}


def sampling(settings: Settings) -> Iterator[Row]:
    """Tests by chi-square that tokens are drawn as the logits say, with a draft and without."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo

    with tempfile.TemporaryDirectory() as folder:
        path = zoo.save_family("qwen3_moe", Path(folder), torch.float32).path
        for draft in ("none", "int4"):
            draw = functools.partial(_draw, path, draft, settings.num_draws)
            yield show(attempt({"draft": draft}, draw))


def _draw(path: Path, draft: str, num_draws: int) -> Row:
    """Draws second tokens, a seed each, and compares them with their exact distribution."""
    from distribution import compare_draws, exact_second

    drawn: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.95}
    prompt = [11, 16, 21, 5]
    # Left to itself the governor would draft nothing for texts as short as these.
    given: dict[str, Any] = {} if draft == "none" else {"draft": draft, "num_draft_tokens": 1}
    with open_engine(path, 200, dtype="float32", **given) as engine:
        seconds = [
            engine.generate(prompt, max_new_tokens=3, seed=seed, **drawn).token_ids[1]
            for seed in range(num_draws)
        ]
        accepted = engine.stats["acceptance_rate"]
        found = compare_draws(seconds, exact_second(engine, prompt, drawn))
        # Both ways to a token must have been taken.
        is_fine = found.is_fine and (draft == "none" or 0 < (accepted or 0) < 1)
        return {**found._asdict(), "acceptance_rate": accepted, "is_fine": is_fine}


def step_through(engine: Engine, token_ids: Sequence[int]) -> tuple[list[Tensor], bool]:
    """Gives the logits of every token, decoded one by one, and whether steps were captured."""
    path = engine._device
    if path is None:
        raise RuntimeError("the engine does not let the device decide")
    with path.lend_step(len(token_ids)) as step:
        if step is None:
            raise RuntimeError(f"{engine.spec.architecture} has no static KV cache")
        logits = [step(token).float() for token in token_ids]
        return logits, step.is_captured


def resident_logits(path: Path, num_tokens: int) -> tuple[list[int], Tensor]:
    """Gives random tokens, and transformers' logits behind each with all experts on the device."""
    resident = load_resident(path, torch.float32)
    vocabulary = resident.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (num_tokens,), generator=generator).tolist()
    with torch.inference_mode():
        return ids, resident(torch.tensor([ids], device=DEVICE)).logits[0].float().cpu()
