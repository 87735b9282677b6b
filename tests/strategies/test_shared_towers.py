"""Images under split rows: features land on their tokens, and towers get the gradient of all images, once."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, FSDP2, ContextParallel, Single, Ulysses
from veomni.testing.ranks import run_ranks
from veomni.testing.step import full_gradients

IMAGE, LENGTH = 120, 48
SPECIAL = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
GRIDS = {"three images": [(1, 4, 4), (1, 4, 8), (1, 8, 4)], "one image": [(1, 8, 8)]}
LAYOUTS = {
    "ulysses2": (2, [DDP(), Ulysses(2)]),
    "async2": (2, [DDP(), Ulysses(2, overlap=True)]),
    "ulysses4": (4, [FSDP2(), Ulysses(4)]),
    "ring2": (2, [DDP(), ContextParallel(2)]),
    "ring2 x ulysses2": (4, [DDP(), ContextParallel(2), Ulysses(2)]),
}


def batch(grids):
    """A row of text with images in it, of which some lie across the border of two parts."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 100, (1, LENGTH), generator=generator)
    at = 5
    for t, h, w in grids:
        features = t * h * w // 4
        ids[0, at : at + features] = IMAGE
        at += features + 3
    assert at < LENGTH
    labels = torch.where(ids == IMAGE, -100, ids)
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, generator=generator)
    positions = torch.stack([torch.arange(LENGTH), *torch.randint(0, LENGTH, (3, LENGTH), generator=generator)])
    return {
        "input_ids": ids, "labels": labels, "position_ids": positions.unsqueeze(1), "pixel_values": patches.double(),
        "image_grid_thw": torch.tensor(grids), "cu_seq_lens_q": torch.tensor([0, LENGTH], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, LENGTH], dtype=torch.int32), "max_length_q": LENGTH, "max_length_k": LENGTH,
    }  # fmt: skip


def gradients(name, strategies, grids):
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config(name, **SPECIAL), weights="random")).train()
    for step in launcher.track([[batch(grids)]]):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
        found = full_gradients(model), launcher.global_loss(step).item()
    launcher.close()
    return found


CASES = [
    *((name, layout, "three images") for name in ("qwen2_5_vl", "qwen3_vl") for layout in LAYOUTS),
    ("qwen3_vl", "ulysses4", "one image"),
]


@pytest.mark.parametrize(("name", "layout", "images"), CASES)
def test_every_gradient_is_that_of_one_process(name, layout, images):
    ranks, strategies = LAYOUTS[layout]
    ((expected, loss),) = run_ranks(gradients, 1, name, [Single()], GRIDS[images], init=False)
    tower = [key for key in expected if "visual" in key and expected[key].norm() > 0]
    assert tower
    for found, found_loss in run_ranks(gradients, ranks, name, strategies, GRIDS[images], init=False):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        scale = max(gradient.norm() for gradient in expected.values())
        for key, gradient in expected.items():
            assert (found[key] - gradient).norm() <= 1e-11 * max(gradient.norm(), 1e-6 * scale), key
