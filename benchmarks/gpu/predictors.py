"""Makes what the predictors of the widened demo need: a calibration and an estimator."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from foreload import Engine
from foreload.calibrate import calibrate
from foreload.train_estimator import train_estimator
from gpu.models import open_staged, widened_demo
from gpu.rows import attempt, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from gpu.rows import Row
    from gpu.settings import Settings


def predictors(settings: Settings) -> Iterator[Row]:
    """Calibrates on the device, by the host's loop, and trains on the processor.

    Both are kept for this user, and arms of later stages find them.
    """
    from foreload.model.source import resolve_model

    model = widened_demo(settings)
    text = (resolve_model("demo") / "calibration.txt").read_text()
    given: dict[str, Any] = {"predictor": "lookahead", "lookahead_layers": 1}
    on_device = functools.partial(open_staged, model, 100, 100, **given)
    calibration = functools.partial(calibrate, max_tokens=settings.num_training_tokens)
    yield show(attempt({"what": "calibration"}, lambda: _make(on_device, calibration, text)))
    on_cpu = functools.partial(
        Engine.from_pretrained, model, device="cpu", expert_memory="100%", **given
    )
    training = functools.partial(train_estimator, max_tokens=settings.num_training_tokens)
    yield show(attempt({"what": "estimator"}, lambda: _make(on_cpu, training, text)))


def _make(
    opened: Callable[[], AbstractContextManager[Engine]], make: Callable[..., Any], text: str
) -> Row:
    start = time.perf_counter()
    with opened() as engine:
        report = make(engine, text).to_dict()
    # Whose home it is in is nobody's business.
    del report["path"]
    return {"took_s": time.perf_counter() - start, **report}
