"""Balance without a loss: the correction bias moves once per step, by the load of the whole step, alike everywhere."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tests.models.any_tiny import any_tiny_config
from tests.models.tiny import tiny_config
from tests.moe.steps import ALL_LAYOUTS, micro_batches
from tests.moe.test_load import truth as load_truth
from veomni.errors import ModelError
from veomni.launcher import Launcher
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.models import build_model, unwrap
from veomni.models.traits.shrink import VOCAB
from veomni.moe import MoEOptions
from veomni.testing.documents import global_rows
from veomni.testing.ranks import RankFailed, run_ranks

RATE = 0.05


def biases(model) -> dict[str, list[float]]:
    found = {}
    for name, module in unwrap(model).named_modules():
        if hasattr(module, "e_score_correction_bias"):
            bias = module.e_score_correction_bias
            whole = bias.full_tensor() if isinstance(bias, DTensor) else bias
            found[name.replace("_fsdp_wrapped_module.", "")] = whole.flatten().tolist()
    return found


def steps(model_name, layout, count, accumulation=1, output_dir=None, mutate=None, resume="none"):
    """The biases after every step."""
    schedule = None if output_dir is None else CheckpointSchedule(output_dir / "checkpoints", resume=resume)
    launcher = Launcher(
        ALL_LAYOUTS[layout][1](), accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60,
        checkpoints=schedule,
    )  # fmt: skip
    launcher.launch()
    config = any_tiny_config(model_name) if model_name == "laguna" else tiny_config(model_name)
    model = launcher.setup_model(
        build_model(config, weights="random"), router=MoEOptions(bias_update_rate=RATE)
    ).train()
    if mutate is not None:
        mutate(launcher)
    state = {"model": model}
    done = launcher.resume(state) if output_dir is not None else 0
    after = [biases(model)]
    place = launcher.data_parallel
    one = micro_batches(global_rows(VOCAB), place.rank, place.size, accumulation)
    for batch in launcher.track([one] * (count - done), max_steps=count):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        model.zero_grad()
        after.append(biases(model))
        if output_dir is not None:
            launcher.checkpoint(state)
    if output_dir is not None:
        launcher.export(model, output_dir / "hf")
    launcher.close()
    return after


def moved(load: dict[str, list[int]]) -> dict[str, list[float]]:
    mean = {name: sum(counts) / len(counts) for name, counts in load.items()}
    sign = {name: [(count < mean[name]) - (count > mean[name]) for count in counts] for name, counts in load.items()}
    return {name: torch.tensor([RATE * s for s in signs]).tolist() for name, signs in sign.items()}


@pytest.mark.parametrize("model", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [("single", 3), ("ddp2", 1), ("fsdp1_full", 3), ("fsdp2_2", 1), ("ulysses2_fsdp2_2", 3), ("ep2_fsdp2", 1)],
)
def test_one_step(model, layout, accumulation):
    expected = moved(load_truth(model))
    assert any(any(values) for values in expected.values())
    for before, after in run_ranks(steps, ALL_LAYOUTS[layout][0], model, layout, 1, accumulation, init=False):
        assert before == {name: [0.0] * 4 for name in expected}
        assert after == expected


def test_ranks_and_layouts_stay_together_and_the_bias_balances():
    single = run_ranks(steps, 1, "deepseek_v3", "single", 6, init=False)[0]
    for other in run_ranks(steps, 4, "deepseek_v3", "ulysses2_fsdp2_2", 6, 3, init=False):
        assert other == single
    assert single[-1] != single[1]


def test_it_is_in_checkpoints_and_exports(tmp_path):
    whole = run_ranks(steps, 2, "deepseek_v3", "fsdp2_2", 4, 1, tmp_path / "whole", init=False)[0]
    run_ranks(steps, 2, "deepseek_v3", "fsdp2_2", 2, 1, tmp_path / "parts", init=False)
    again = run_ranks(steps, 2, "deepseek_v3", "ddp2", 4, 1, tmp_path / "parts", None, "auto", init=False)[0]
    assert again == whole[2:]
    (exported,) = (tmp_path / "parts" / "hf").glob("*.safetensors")
    tensors = load_file(exported)
    assert {name: tensors[f"{name}.e_score_correction_bias"].tolist() for name in whole[-1]} == whole[-1]


def test_a_bias_that_is_a_parameter():
    (single,) = run_ranks(steps, 1, "laguna", "single", 3, init=False)
    assert any(any(values) for values in single[-1].values())
    for layout in ("ddp2", "fsdp2_2"):
        assert run_ranks(steps, 2, "laguna", layout, 3, init=False) == [single] * 2
    with pytest.raises(RankFailed) as failed:
        run_ranks(steps, 2, "laguna", "fsdp1_full", 1, init=False)
    assert all(isinstance(error, ModelError) and "fsdp1" in str(error) for error in failed.value.exceptions.values())


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        ("qwen3_moe", MoEOptions(bias_update_rate=0.1), "Qwen3MoeTopKRouter"),
        ("llama", MoEOptions(bias_update_rate=0.1), "bias_update_rate"),
        ("llama", MoEOptions(aux_loss_coef=0.1), "aux_loss_coef"),
        ("llama", MoEOptions(z_loss_coef=0.1), "z_loss_coef"),
    ],
)
def test_models_that_cannot_are_rejected_by_name(model, options, named):
    def set_up():
        launcher = Launcher("single", accelerator="cpu")
        launcher.launch()
        launcher.setup_model(build_model(tiny_config(model), weights="random"), router=options)

    with pytest.raises(RankFailed) as failed:
        run_ranks(set_up, 1, init=False)
    error = failed.value.exceptions[0]
    assert isinstance(error, ModelError)
    assert named in str(error)
