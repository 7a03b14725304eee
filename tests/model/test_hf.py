"""A model loaded without its experts answers bit for bit as the whole one does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from streaming import StreamedExperts, align, read_expert
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo
from foreload.errors import CheckpointError, ForeloadError, UnsupportedModelError
from foreload.model import hf
from foreload.model.sites import probe_sites

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

MORE = ["granitemoe", "qwen3_vl_moe", "nemotron_h", "gemma4", "jamba"]


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=zoo.prompt(), **inputs).logits
    return output


def check_same_logits(checkpoint: zoo.TinyCheckpoint, dtype: torch.dtype) -> None:
    loaded = hf.load_model(checkpoint.path, dtype=dtype, model_class=checkpoint.model_class)
    run = StreamedExperts(loaded.plans)
    hf.attach(loaded.sites, run)
    reference = align(checkpoint.load_reference(dtype))
    assert torch.equal(logits(loaded.model), logits(reference))
    assert run.layers == list(range(len(loaded.sites)))
    wanted = dict(reference.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == wanted[name].dtype, name
        assert not parameter.is_meta
        assert not parameter.requires_grad
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", zoo.SEVEN_FAMILIES)
def test_streamed_logits_are_eager_logits(tmp_path: Path, arch: str, dtype: torch.dtype) -> None:
    check_same_logits(zoo.save_family(arch, tmp_path, dtype), dtype)


@pytest.mark.parametrize("arch", MORE)
def test_other_layouts_and_blocks_too(tmp_path: Path, arch: str) -> None:
    check_same_logits(zoo.save_tiny(arch, tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("kind", "arch"), [("fp8", "qwen3_moe"), ("fp8", "deepseek_v3"), ("mxfp4", "gpt_oss")]
)
def test_quantised_checkpoints_are_dequantised(tmp_path: Path, kind: Any, arch: str) -> None:
    check_same_logits(zoo.save_quantised(kind, arch, tmp_path), torch.bfloat16)


def test_a_quantised_checkpoint_can_be_had_in_float32(tmp_path: Path) -> None:
    checkpoint = zoo.save_quantised("fp8", "qwen3_moe", tmp_path)
    loaded = hf.load_model(checkpoint.path, dtype="float32")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    hf.attach(loaded.sites, StreamedExperts(loaded.plans))
    assert logits(loaded.model).isfinite().all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> zoo.TinyCheckpoint:
    return zoo.save_family("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), torch.bfloat16)


def test_no_expert_is_read_while_loading(checkpoint: zoo.TinyCheckpoint) -> None:
    seen: list[tuple[int, int]] = []
    loaded = hf.load_model(checkpoint.path, progress=lambda done, total: seen.append((done, total)))
    experts = sum(plan.read_bytes for layer in loaded.plans for plan in layer)
    assert seen[-1] == (loaded.index.total_bytes - experts,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for site in loaded.sites:
        assert not list(site.experts.parameters())
        assert site.experts.down_proj.is_meta


def test_loading_leaves_transformers_as_it_was(checkpoint: zoo.TinyCheckpoint) -> None:
    verbosity = transformers.logging.get_verbosity()
    default_dtype = torch.get_default_dtype()
    loaded = hf.load_model(checkpoint.path)
    assert type(loaded.model) is checkpoint.model_class
    assert transformers.logging.get_verbosity() == verbosity
    assert transformers.logging.is_progress_bar_enabled()
    assert torch.get_default_dtype() is default_dtype
    whole = checkpoint.load_reference(torch.bfloat16)
    assert all(
        isinstance(site.experts.down_proj, torch.nn.Parameter) for site in hf.discover_sites(whole)
    )


def test_loading_prints_nothing(
    checkpoint: zoo.TinyCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    hf.load_model(checkpoint.path)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_spec_counts_what_is_there(checkpoint: zoo.TinyCheckpoint) -> None:
    loaded = hf.load_model(checkpoint.path)
    spec = loaded.spec
    assert spec.architecture == "Qwen3MoeForCausalLM"
    assert spec.model_type == "qwen3_moe"
    assert (spec.num_moe_layers, spec.num_experts, spec.top_k, spec.hidden_size) == (3, 16, 4, 64)
    assert spec.dtype == "bfloat16"
    assert spec.expert_bytes == 3 * 48 * 64 * 2
    assert spec.total_expert_bytes == 48 * spec.expert_bytes
    assert spec.identity == loaded.index.identity
    stored = sum(entry.num_bytes for entry in loaded.index.entries.values())
    buffers = sum(buffer.nbytes for buffer in loaded.model.buffers())
    assert spec.dense_bytes == stored - spec.total_expert_bytes + buffers


def test_a_model_without_an_engine_says_so(checkpoint: zoo.TinyCheckpoint) -> None:
    loaded = hf.load_model(checkpoint.path)
    with pytest.raises(ForeloadError, match="engine was closed"):
        logits(loaded.model)
    hf.attach(loaded.sites, StreamedExperts(loaded.plans))
    logits(loaded.model)
    hf.detach(loaded.sites)
    with pytest.raises(ForeloadError, match="engine was closed"):
        logits(loaded.model)


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
@pytest.mark.parametrize("is_attached", [True, False])
def test_a_model_without_its_experts_is_not_saved(
    tmp_path: Path, method: str, is_attached: bool
) -> None:
    folder = tmp_path / "model"
    loaded = hf.load_model(zoo.save_family("qwen3_moe", folder).path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    hf.attach(loaded.sites, StreamedExperts(loaded.plans))
    if not is_attached:
        hf.detach(loaded.sites)
    for part in (loaded.model, loaded.model.model):
        for place in (folder, tmp_path / "other"):
            with pytest.raises(ForeloadError, match="cannot be saved") as caught:
                getattr(part, method)(str(place))
            assert str(folder) in str(caught.value.hint)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_other_models_of_the_class_are_saved(
    checkpoint: zoo.TinyCheckpoint, tmp_path: Path
) -> None:
    hf.load_model(checkpoint.path)
    checkpoint.load_reference(torch.bfloat16).save_pretrained(tmp_path)
    assert hf.load_model(tmp_path).spec.total_expert_bytes > 0


def test_a_part_without_experts_can_be_saved(tmp_path: Path) -> None:
    loaded = hf.load_model(zoo.save_tiny("qwen3_vl_moe", tmp_path / "model").path)
    loaded.model.model.visual.save_pretrained(tmp_path / "visual")
    assert (tmp_path / "visual" / "model.safetensors").is_file()


def test_the_probe_needs_no_engine(checkpoint: zoo.TinyCheckpoint) -> None:
    loaded = hf.load_model(checkpoint.path)
    probe_sites(loaded.model, loaded.sites, zoo.prompt(4))
    assert all(site.is_predictable for site in loaded.sites)
    assert all(type(site.norm).__name__ == "Qwen3MoeRMSNorm" for site in loaded.sites)


def test_two_models_do_not_mix(checkpoint: zoo.TinyCheckpoint, tmp_path: Path) -> None:
    other = zoo.save_family("olmoe", tmp_path)
    first, second = hf.load_model(checkpoint.path), hf.load_model(other.path)
    hf.attach(first.sites, StreamedExperts(first.plans))
    hf.attach(second.sites, StreamedExperts(second.plans))
    reference = align(other.load_reference())
    assert torch.equal(logits(second.model), logits(reference))
    hf.detach(second.sites)
    assert logits(first.model).isfinite().all()


def test_generate_runs_on_streamed_experts(checkpoint: zoo.TinyCheckpoint) -> None:
    loaded = hf.load_model(checkpoint.path)
    hf.attach(loaded.sites, StreamedExperts(loaded.plans))
    reference = align(checkpoint.load_reference(torch.bfloat16))
    options = {"max_new_tokens": 6, "do_sample": False}
    found = loaded.model.generate(zoo.prompt(), **options)
    assert torch.equal(found, reference.generate(zoo.prompt(), **options))


def test_importing_registers_nothing() -> None:
    code = "import sys, foreload.model.hf; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_dense_tensor_is_an_error_not_a_random_one(tmp_path: Path) -> None:
    zoo.save_family("olmoe", tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(tmp_path, lambda tensors: tensors.pop(name, None))
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors .*{name}"):
        hf.load_model(tmp_path)


def test_a_dense_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    zoo.save_family("olmoe", tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"

    def shorten(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name][:-1].contiguous()

    edit(tmp_path, shorten)
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[63, 64\]"):
        hf.load_model(tmp_path)


def test_a_file_cut_off_after_indexing_is_an_error(
    checkpoint: zoo.TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = zoo.save_family("olmoe", tmp_path)
    index = hf.CheckpointIndex.open(copy.path)
    last = max(index.entries.values(), key=lambda entry: (entry.path, entry.offset))
    monkeypatch.setattr(hf.CheckpointIndex, "open", lambda directory: index)
    for path in index.files:
        with open(path, "r+b") as file:
            file.truncate(last.offset if path == last.path else 100)
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        hf.load_model(copy.path)


def test_generation_settings_come_from_the_checkpoint(tmp_path: Path) -> None:
    zoo.save_family("olmoe", tmp_path)
    settings = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    generation = hf.load_model(tmp_path).generation
    assert generation.eos_token_ids == (2, 7)
    assert generation.do_sample
    assert (generation.temperature, generation.top_p) == (0.6, 0.95)
    assert generation.bos_token_id == 1
    assert generation.max_positions == 512
    (tmp_path / "generation_config.json").unlink()
    assert hf.load_model(tmp_path).generation.eos_token_ids == (2,)


def test_a_model_without_experts_is_sent_to_transformers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="has no experts") as caught:
        hf.load_model(tmp_path)
    assert "transformers" in str(caught.value.hint)


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def test_the_tokenizer_is_loaded_where_there_is_one(tmp_path: Path) -> None:
    assert hf.load_tokenizer(tmp_path) is None
    save_tokenizer(tmp_path)
    tokenizer = hf.load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer("hello world")["input_ids"] == [1, 2]


def test_a_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        hf.load_tokenizer(tmp_path)


def test_an_expert_read_from_its_plan_is_complete(checkpoint: zoo.TinyCheckpoint) -> None:
    loaded = hf.load_model(checkpoint.path)
    expert = read_expert(loaded.plans[0][0])
    assert sum(tensor.nbytes for tensor in expert.values()) == loaded.spec.expert_bytes
