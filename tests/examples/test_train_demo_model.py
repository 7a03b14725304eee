"""The script that trains the demo model works from end to end, in a tiny configuration."""

import csv
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_demo_model.py"
TRAINED_ON = ["bisect.py", "glob.py", "queue.py", "sched.py", "shelve.py", "string.py"]
HELD_OUT = ["heapq.py", "textwrap.py"]


def _run(*arguments: object) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with the work directory and the output of an interrupted run."""
    folder = tmp_path_factory.mktemp("demo")
    source, library = folder / "source", Path(sysconfig.get_paths()["stdlib"])
    (source / "test").mkdir(parents=True)
    for name in TRAINED_ON + HELD_OUT:
        shutil.copyfile(library / name, source / name)
    shutil.copyfile(library / "queue.py", source / "test" / "test_heapq.py")  # a duplicate
    common = ["--source", source, "--work", folder / "work"]
    _run(*common, "--minutes", "0.02")
    _run(*common, "--minutes", "0.05", "--resume", "--out", folder / "out")
    return folder


def test_export_is_complete_and_loads(trained: Path) -> None:
    out = trained / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "README.md",
        "calibration.txt",
        "config.json",
        "generation_config.json",
        "held_out.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.csv",
    }
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)("def f():\n    return 1\n", return_tensors="pt")
    logits = model(ids["input_ids"]).logits
    assert logits.isfinite().all()


def test_resumed_run_goes_on_and_learns(trained: Path) -> None:
    with (trained / "out" / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps, seconds = ([float(row[key]) for row in rows] for key in ("step", "seconds"))
    assert steps == sorted(set(steps))
    assert seconds == sorted(seconds)
    before, after = (float(row["held_out_loss"]) for row in rows if row["held_out_loss"])
    assert after < before


def test_held_out_modules_and_their_tests_are_not_trained_on(
    monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import demo_corpus

    corpus = demo_corpus.collect(trained / "source")
    assert {d.name for d in corpus.held_out} == {*HELD_OUT, "test/test_heapq.py"}
    assert {d.name for d in corpus.train} == {*TRAINED_ON} - {"queue.py"}
    assert corpus.rejected["duplicate"] == ["queue.py"]
    calibration = (trained / "out" / "calibration.txt").read_text()
    assert all(f"file: {name} ---" not in calibration for name in HELD_OUT)


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("json/decoder.py", True),
        ("argparse.py", True),
        ("test/test_asyncio/test_events.py", True),
        ("test/test_http_cookies.py", True),
        ("test/test_httplib.py", True),
        ("test/test_asyncore.py", False),
        ("asyncore.py", False),
        ("jsonish.py", False),
    ],
)
def test_held_out_names(monkeypatch: pytest.MonkeyPatch, name: str, held_out: bool) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import demo_corpus

    assert demo_corpus.is_held_out(name) is held_out


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_and_transformers_losses_agree(
    monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import demo_network
    import train_demo_model

    weights = train_demo_model.trained_weights(trained / "work")
    shape = demo_network.ModelShape(512, 32, 2, 2, 1, 16, 4, 2, 16, 128)
    model = AutoModelForCausalLM.from_pretrained(trained / "out", dtype=torch.float32)
    ids = torch.randint(512, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.compiler.set_stance("force_eager")
        try:
            half = {name: weight.bfloat16() for name, weight in weights.items()}
            loss, _, _ = demo_network.forward(
                shape, demo_network.RouterLoss(), half, ids[:, :-1], ids[:, 1:]
            )
        finally:
            torch.compiler.set_stance("default")
        logits = model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), abs=0.05)
