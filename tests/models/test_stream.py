"""Weights from safetensors: what from_pretrained would load, each rank reading its own rows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.layouts import CPU, fsdp1, fsdp2, materialized
from tests.models.tiny import OTHER_MODELS, TEXT_MODELS, tiny_config
from veomni.errors import ModelError
from veomni.models import Materializer, build_model
from veomni.models.weights.export import full_tensors
from veomni.models.weights.safetensors_files import SafetensorsFiles
from veomni.testing.ranks import RankFailed, run_ranks


def saved(name: str, directory, shard_size: str = "5GB", **changes) -> torch.nn.Module:
    """Save a model as transformers makes and writes it; return it."""
    config = tiny_config(name, **changes)
    model = build_model(config)
    torch.manual_seed(5)
    reference = type(model)._from_config(tiny_config(name, **changes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # so that no norm is all ones
    reference.save_pretrained(directory, max_shard_size=shard_size)
    reference.config.use_cache = False
    return reference


def check_equal(tensors, reference: torch.nn.Module) -> None:
    expected = dict(full_tensors(reference))
    ours = dict(tensors)
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", [*TEXT_MODELS, *OTHER_MODELS])
def test_what_transformers_saves_is_loaded(name, tmp_path):
    reference = saved(name, tmp_path)
    check_equal(full_tensors(materialized(tmp_path, attention="eager")), reference)


def _full(layout, source, **options):
    return {name: tensor.clone() for name, tensor in full_tensors(layout(source, **options))}


@pytest.mark.parametrize("name", ["nomic_bert", "qwen3_vl_moe"])
@pytest.mark.parametrize("options", [{}, {"broadcast": True}])
def test_sharded_models_load_what_is_split_or_transposed(name, options, tmp_path):
    reference = saved(name, tmp_path)
    for tensors in run_ranks(_full, 2, fsdp2, tmp_path, **options):
        check_equal(tensors.items(), reference)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("ranks", "options"), [(2, {}), (4, {"replicate": 2}), (2, {"broadcast": True})])
def test_sharded_models_load_from_sharded_files(name, ranks, options, tmp_path):
    reference = saved(name, tmp_path, shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 2
    for tensors in run_ranks(_full, ranks, fsdp2, tmp_path, **options):
        check_equal(tensors.items(), reference)


def test_fsdp1_loads_block_by_block(tmp_path):
    reference = saved("qwen3_moe", tmp_path)
    check_equal(run_ranks(_full, 2, fsdp1, tmp_path)[0].items(), reference)


def test_a_float64_model_takes_the_stored_numbers(tmp_path):
    reference = saved("llama", tmp_path)
    tensors = run_ranks(_full, 2, fsdp2, tmp_path, dtype=torch.float64)[0]
    assert tensors["lm_head.weight"].dtype is torch.float64
    assert torch.equal(tensors["lm_head.weight"], reference.lm_head.weight.double())


def test_bfloat16_files_load_into_float32_parameters(tmp_path):
    reference = saved("qwen3_moe", tmp_path)
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    model = materialized(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.norm.weight, reference.model.norm.weight.float())


def _count_elements(source):
    read = SafetensorsFiles.read
    elements = []
    largest = []

    def counting(self, name, box=None):
        tensor = read(self, name, box)
        elements.append(tensor.numel())
        largest.append(tensor.shape)
        return tensor

    SafetensorsFiles.read = counting
    try:
        model = fsdp2(source)
    finally:
        SafetensorsFiles.read = read
    return sum(elements), sum(p.to_local().numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "gpt_oss"])
def test_each_rank_reads_its_own_rows_only(name, tmp_path):
    reference = saved(name, tmp_path)
    total = sum(parameter.numel() for parameter in reference.parameters())
    counts = run_ranks(_count_elements, 2, tmp_path)
    assert [read for read, held in counts] == [held for read, held in counts]
    assert sum(read for read, held in counts) == total


def test_broadcasting_reads_on_rank_zero_only(tmp_path):
    saved("qwen3_moe", tmp_path)
    counts = run_ranks(_count_broadcast, 2, tmp_path)
    assert counts[0] > 0
    assert counts[1] == 0


def _count_broadcast(source):
    read = SafetensorsFiles.read
    names = []
    SafetensorsFiles.read = lambda self, name, box=None: names.append(name) or read(self, name, box)
    fsdp2(source, broadcast=True)
    SafetensorsFiles.read = read
    return len(names)


def rewrite(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def test_the_base_models_prefix_is_added_and_removed(tmp_path):
    reference = saved("qwen3", tmp_path)  # tied: no head in the file
    rewrite(tmp_path, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    check_equal(full_tensors(materialized(tmp_path)), reference)
    body = materialized(tiny_config("qwen3"), weights="random")
    assert isinstance(body, transformers.Qwen3ForCausalLM)
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"]}))
    check_equal(full_tensors(materialized(tmp_path)), reference.model)


def test_tied_weights_may_be_stored_under_either_name_or_both(tmp_path):
    reference = saved("qwen3", tmp_path)
    key, tied = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(tmp_path, lambda tensors: {tied if name == key else name: value for name, value in tensors.items()})
    check_equal(full_tensors(materialized(tmp_path)), reference)
    rewrite(tmp_path, lambda tensors: {**tensors, key: tensors[tied].clone()})
    check_equal(full_tensors(materialized(tmp_path)), reference)
    rewrite(tmp_path, lambda tensors: {**tensors, key: tensors[key] + 1})
    with pytest.raises(ModelError, match="differ, but the configuration ties them"):
        materialized(tmp_path)


def _drop(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


MISFITS = {
    "missing": (lambda t: _drop(t, "model.norm.weight"), r"1 missing: model\.norm\.weight"),
    "unexpected": (lambda t: {**t, "model.extra.weight": torch.ones(1)}, r"1 unexpected: model\.extra\.weight"),
    "shape": (
        lambda t: {**t, "model.norm.weight": torch.ones(31)},
        r"1 of another shape: model\.norm\.weight \(file \[31\], model \[32\]\)",
    ),
    "expert": (lambda t: _drop(t, "model.layers.0.mlp.experts.2.up_proj.weight"), r"layers\.0\.mlp\.experts"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_named(case, tmp_path):
    saved("qwen3_moe", tmp_path)
    change, message = MISFITS[case]
    rewrite(tmp_path, change)
    model = build_model(tmp_path)
    with pytest.raises(ModelError, match=message):
        Materializer(model, device=CPU, seed=0)


def test_a_misfit_stops_every_rank(tmp_path):
    saved("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: _drop(tensors, "model.norm.weight"))
    with pytest.raises(RankFailed) as failure:
        run_ranks(_full, 2, fsdp2, tmp_path, broadcast=True)
    assert {type(error) for error in failure.value.exceptions.values()} == {ModelError}
    assert len(failure.value.exceptions) == 2


def test_weights_of_prediction_layers_that_the_model_lacks_are_skipped(tmp_path):
    reference = saved("deepseek_v3", tmp_path)
    pattern = "model.layers.61.self_attn.o_proj.weight"  # DeepSeek-V3's multi-token prediction
    rewrite(tmp_path, lambda tensors: {**tensors, pattern: torch.ones(2, 2)})
    check_equal(full_tensors(materialized(tmp_path)), reference)


def test_missing_buffers_are_initialised(tmp_path):
    saved("deepseek_v3", tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(tmp_path, lambda tensors: _drop(tensors, name))
    assert torch.equal(materialized(tmp_path).get_buffer(name), torch.zeros(4))


def test_weights_from_another_directory(tmp_path):
    reference = saved("llama", tmp_path / "weights")
    shutil.copytree(tmp_path / "weights", tmp_path / "config")
    (tmp_path / "config" / "model.safetensors").unlink()
    check_equal(full_tensors(materialized(tmp_path / "config", weights=tmp_path / "weights")), reference)
    random = materialized(tmp_path / "weights", weights="random")
    assert not torch.equal(random.lm_head.weight, reference.lm_head.weight)
