"""What the pages say is true of the code: examples run, commands parse, links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import foreload
from foreload import errors
from foreload.cli import app
from foreload.config import EngineConfig
from foreload.metrics import Metrics, RequestStats
from foreload.model import source

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "foreload" / "demo"
EXAMPLE = ROOT / "examples" / "quickstart.py"
GENERATE = ROOT / "docs" / "reference" / "generate.py"
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    }
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)!?\[[^\]\n]*\]\(([^)\s]+)\)")
MAX_FIGURE_BYTES = 80_000
FIRST_SCREEN = 45


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return FENCE.sub("", read(page))


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(read(page)) if found == language]


def ident(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def command_lines() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for language in ("bash", "sh", "console"):
            for code in blocks(page, language):
                for line in code.replace("\\\n", " ").splitlines():
                    yield page, line.strip().removeprefix("$ ")
        for code in re.findall(r"`(foreload [a-z-]+ [^`]*-[^`]*)`", prose(page)):
            yield page, code


COMMANDS = [
    (page, line) for page, line in command_lines() if re.match(r"([A-Z_]+=\S+ )*foreload ", line)
]
SCRIPTS = [(page, line) for page, line in command_lines() if "scripts/" in line]


@pytest.fixture(autouse=True)
def _small_world(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Give `demo` a meaning where it is not there yet, and keep calibrations out of the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text like the text to be written\n" * 50)
    (tmp_path / "notes.jsonl.gz").touch()
    if not (DEMO / "model.safetensors").is_file():
        tiny = request.getfixturevalue("tiny_checkpoint")
        (tmp_path / "src" / "foreload" / "demo").mkdir(parents=True)
        (tmp_path / "src" / "foreload" / "demo" / "calibration.txt").touch()
        monkeypatch.setattr(source, "_find_demo", lambda: tiny)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", with_blocks("python"), ids=ident)
def test_the_python_of_a_page_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__page__"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    assert "error" not in capsys.readouterr().err.lower()


def test_the_readmes_python_is_the_example() -> None:
    docstring, _, code = read(EXAMPLE).partition("\n\n")
    assert docstring.startswith('"""')
    assert blocks(ROOT / "README.md", "python") == [code]


def test_the_example_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(read(EXAMPLE), EXAMPLE.name, "exec"), {})
    printed = capsys.readouterr().out.rstrip().splitlines()
    shown = "\n".join(blocks(ROOT / "README.md", "text")).rstrip().splitlines()
    assert re.fullmatch(r"\d+% of the expert lookups found the expert in memory", printed[-1])
    if (DEMO / "model.safetensors").is_file():
        # Text and rate may differ between processors; what is said about them may not.
        assert len(shown) > 1, "README.md lacks the output of examples/quickstart.py"
        assert masked(shown[-1]) == masked(printed[-1])


def masked(line: str) -> str:
    return re.sub(r"\d+", "0", line)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=ident)
def test_a_command_line_parses(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    parse(words[1:])


def parse(words: list[str]) -> None:
    """Parse a command's arguments as the command does, without running it."""
    command: Any = typer.main.get_command(app)
    path = "foreload"
    while hasattr(command, "commands"):
        if words == ["--version"]:
            return
        assert words, f"{path} needs a verb"
        assert words[0] in command.commands, f"{path} has no verb {words[0]}"
        path = f"{path} {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if words != ["--help"]:
        command.make_context(path, placeholders(words))


def placeholders(words: list[str]) -> list[str]:
    """Put what exists where a page has a placeholder in capitals, or a file of the repository."""
    known = {"MODEL": "demo", "DIR": "somewhere", "SHAPE": "qwen3-30b-a3b", "...": "text"}
    files = {word: str(ROOT / word) for word in words if (ROOT / word).is_file()}
    return [known.get(word, files.get(word, word)) for word in words]


@pytest.mark.parametrize(("page", "line"), SCRIPTS, ids=ident)
def test_a_script_exists_and_its_options_too(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)
    script = ROOT / words[0]
    assert script.is_file()
    assert script.stat().st_mode & 0o111
    if script.name == "bench":
        parse(["bench", *[word.replace("NAME", "auto") for word in words[1:]]])


def test_wrong_command_lines_do_not_parse() -> None:
    usage_error = typer.BadParameter.__bases__[0]
    for line in ("generate --expert-memori 25%", "generat", "generate --predictor psychic"):
        with pytest.raises((AssertionError, usage_error)):
            parse(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert ROOT in file.parents
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_files_a_page_names_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "src" / "foreload", page.parent)
    for name in re.findall(r"`([\w./-]+/[\w./-]*\.(?:py|md|txt|toml))`", prose(page)):
        if "NAME" not in name:
            assert any((root / name).is_file() for root in roots), f"{page.name} names {name}"
    for name in re.findall(
        r"`((?:src|tests|docs|scripts|benchmarks|examples)/[\w/]*)`", read(page)
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in LINK.findall(prose(page)):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.is_file():
                waiting.append(file)
    assert not set(PAGES) - reached


def test_the_readmes_first_screen_is_short() -> None:
    lines = read(ROOT / "README.md").splitlines()
    assert lines.index("## What it does not do") <= FIRST_SCREEN


@pytest.mark.parametrize("figure", sorted(ROOT.glob("docs/figures/*.png")), ids=ident)
def test_a_figure_is_small_shown_and_drawn_by_the_script(figure: Path) -> None:
    assert figure.stat().st_size < MAX_FIGURE_BYTES
    assert any(f"figures/{figure.name}" in read(page) for page in PAGES)
    drawn = read(figure.parent / "make.py")
    assert f'"{figure.stem}"' in drawn or f'"{figure.name}"' in drawn


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_reference", GENERATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_current() -> None:
    for name, text in generator().render().items():
        page = GENERATE.parent / name
        assert read(page) == text, f"run python {GENERATE.relative_to(ROOT)}: {name} is old"


def test_reference_pages_have_every_public_thing() -> None:
    reference = generator().render()
    for name in foreload.__all__:
        assert name.startswith("_") or f"`{name}`" in reference["api.md"]
    for name in errors.__all__:
        assert f"## {name}\n" in reference["errors.md"]
    for field in dataclasses.fields(EngineConfig):
        assert f"| `{field.name}` |" in reference["config.md"]
        if field.name != "model":
            assert f"`--{field.name.replace('_', '-')}`" in reference["cli.md"]
    for words in (
        "generate",
        "chat",
        "inspect",
        "calibrate",
        "train-estimator",
        "evaluate",
        "trace",
        "simulate",
        "bench",
        "make-model widen",
    ):
        assert f"## foreload {words}\n" in reference["cli.md"]


METRIC_NAMES = {
    *(field.name for cls in (Metrics, RequestStats) for field in dataclasses.fields(cls)),
    *(name for name, value in vars(Metrics).items() if isinstance(value, property)),
}


def glossary_rows() -> list[tuple[list[str], str]]:
    text = read(ROOT / "docs" / "glossary.md").partition("## Metrics")[2]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE)
    return [(re.findall(r"`(\w+)`", names), formula) for names, formula in rows]


def test_the_glossarys_metrics_are_the_codes() -> None:
    named = {name for names, _ in glossary_rows() for name in names}
    assert named <= METRIC_NAMES
    assert {field.name for field in dataclasses.fields(RequestStats)} <= named


def test_the_glossarys_formulas_use_names_of_the_code() -> None:
    for names, formula in glossary_rows():
        for code in re.findall(r"`([^`]*)`", formula):
            assert set(re.findall(r"[a-z_]\w+", code)) <= METRIC_NAMES, names


@pytest.mark.parametrize("name", ["tpot_s", "stall_fraction", "hit_rate", "late_rate"])
def test_a_formula_of_the_glossary_stands_in_the_docstring(name: str) -> None:
    formula = next(formula for names, formula in glossary_rows() if names == [name])
    code = re.findall(r"`([^`]*)`", formula)[0]
    assert f"{name}: {code}" in (RequestStats.__doc__ or "")


def test_the_glossarys_derived_numbers_come_out() -> None:
    counters: Any = {
        f.name: i + 2 for i, f in enumerate(dataclasses.fields(Metrics)) if f.type == "int"
    }
    metrics = Metrics(**counters)
    values = {name: getattr(metrics, name) for name in METRIC_NAMES if hasattr(metrics, name)}
    checked = 0
    for names, formula in glossary_rows():
        code = re.findall(r"`([^`]*)`", formula)
        is_derived = len(names) == 1 and isinstance(vars(Metrics).get(names[0]), property)
        if is_derived and names[0] != "recall_at_n":
            assert eval(code[0], {}, values) == pytest.approx(values[names[0]]), names
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize(
    ("setting", "page"),
    [
        ("predictor", "prediction.md"),
        ("eviction", "eviction.md"),
        ("policy", "policies.md"),
        ("draft", "speculative-decoding.md"),
    ],
)
def test_a_concept_page_has_every_choice(setting: str, page: str) -> None:
    text = read(ROOT / "docs" / "concepts" / page)
    rows = set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE))
    assert rows == {setting, *EngineConfig.CHOICES[setting]}


def test_troubleshooting_has_every_error() -> None:
    text = read(ROOT / "docs" / "troubleshooting.md")
    for name in errors.__all__:
        assert f"**{name}**" in text


def test_the_architecture_names_functions_that_exist() -> None:
    text = prose(ROOT / "docs" / "architecture.md")
    top = {path.stem for path in (ROOT / "src" / "foreload").iterdir() if path.stem[0] != "_"}
    names = [n for n in re.findall(r"`(\w+(?:\.\w+)+)`", text) if n.split(".")[0] in top]
    names = [name for name in names if not name.endswith(".py")]
    assert len(names) > 20
    for name in names:
        find(name)


def find(name: str) -> Any:
    """Import the longest module that a dotted name begins with, and get the rest from it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(["foreload", *parts[:end]]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def test_the_architecture_has_every_floor() -> None:
    text = read(ROOT / "docs" / "architecture.md").partition("## Floors")[2].partition("\n## ")[0]
    drawn = [
        re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    ]
    contract = re.search(r"^layers = \[\n(.*?)^\]", read(ROOT / "pyproject.toml"), re.M | re.S)
    assert contract is not None
    floors = [re.findall(r"\w+", line) for line in contract[1].splitlines()]
    assert [sorted(floor) for floor in drawn] == [sorted(floor) for floor in floors]


def test_the_benchmark_page_has_every_arm() -> None:
    engine = importlib.import_module("foreload.bench.suite").ENGINE_ARMS
    speculation = importlib.import_module("foreload.bench.speculating_experts").SPECULATION_ARMS
    drafts = importlib.import_module("foreload.bench.moe_speq").MOE_SPEQ_ARMS
    text = read(ROOT / "docs" / "benchmarks.md")
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert rows == [arm.name for arm in (*engine, *speculation, *drafts)]


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {foreload.__version__}" in read(ROOT / "CHANGELOG.md")
