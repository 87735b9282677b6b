"""The loss of each source of a mixture, in every layout, equals that of its documents by themselves in float64."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from tests.data.loaders import make_loader
from tests.data.stream_files import jsonl
from tests.models.tiny import tiny_config
from veomni.batch.fields import IGNORE_INDEX
from veomni.data import DataSource, RecordSchema, build_mixture
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, FSDP2, ContextParallel, Single, Ulysses
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.oracle import initial_model
from veomni.testing.ranks import run_ranks

SOURCES, STEPS = ("code", "prose", "rare"), 4


def weight_of(token):
    return token % 5 / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources of token ids: tokens of one have weights, some of another are not learned, and one has few documents."""
    folder, draw = tmp_path_factory.mktemp("sources"), torch.Generator().manual_seed(3)
    for name, count in zip(SOURCES, (30, 24, 12), strict=True):
        rows = []
        for _ in range(count):
            ids = torch.randint(3, 128, (int(torch.randint(4, 22, (), generator=draw)),), generator=draw).tolist()
            rows.append({"input_ids": ids})
            if name == "code":
                rows[-1]["loss_weights"] = [weight_of(token) for token in ids]
            if name == "prose":
                rows[-1]["labels"] = [IGNORE_INDEX, *(IGNORE_INDEX if token % 2 else token for token in ids[1:])]
        jsonl(folder / f"{name}.jsonl", rows)
    return folder


def loader_of(folder, tokenizer, **options):
    sources = [
        DataSource(str(folder / f"{name}.jsonl"), name, weight, RecordSchema("pretokenized"))
        for name, weight in zip(SOURCES, (4, 3, 0.4), strict=True)
    ]
    stopping = options.pop("stopping", "repeat")
    dataset = build_mixture(sources, streaming=True, stopping_strategy=stopping)
    return make_loader(dataset, tokenizer, global_batch_size=8, max_seq_len=32, stream_shards=4, lookahead=4,
                            cache_dir=folder / "cache", pin_memory=False, **options)  # fmt: skip


def steps_of(folder, tokenizer, strategies, micro_batch_size, fused):
    """Forward and backward through some steps, without an update."""
    launcher = Launcher(strategies, accelerator="cpu", precision="fp64")
    launcher.launch()
    loader = loader_of(folder, tokenizer, parallel=launcher.data_parallel, shard=launcher.sequence_shard,
                       micro_batch_size=micro_batch_size)  # fmt: skip
    model = launcher.setup_model(build_model(tiny_config("llama"), attention="eager"), fused_loss=fused)
    found = []
    for batch in launcher.track(loader, max_steps=STEPS):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        found.append((float(launcher.global_loss(batch)), launcher.source_metrics(batch)))
    launcher.close()
    return found


@pytest.fixture(scope="module")
def truth(folder, tokenizer):
    """Loss, documents and tokens of each source in each step, from documents one by one."""
    model, steps = initial_model(tiny_config("llama"), "cpu"), []
    for step in itertools.islice(loader_of(folder, tokenizer), STEPS):
        sums, counts = defaultdict(lambda: [0.0, 0.0]), defaultdict(lambda: [0, 0])
        for micro in step:
            sources = iter(micro.origin.document_sources)
            for row in range(len(micro["input_ids"])):
                starts = [*(micro["position_ids"][row] == 0).nonzero().flatten().tolist(), 32]
                for start, stop in itertools.pairwise(starts):
                    if start >= micro.rows.row_lengths[row]:
                        continue
                    name = SOURCES[next(sources)]
                    labels = micro["labels"][row, start:stop][1:]
                    with torch.no_grad(), Float64Throughout():
                        logits = model(input_ids=micro["input_ids"][row, start:stop][None], use_cache=False).logits[0]
                    weights = (labels != IGNORE_INDEX).double()
                    if name == "code":
                        weights *= weight_of(labels.clamp(min=0).double())
                    each = F.cross_entropy(logits[:-1].double(), labels, reduction="none")
                    sums[name][0] += float((weights * each).sum())
                    sums[name][1] += float(weights.sum())
                    counts[name][0] += 1
                    counts[name][1] += stop - start
        steps.append((sums, counts))
    return steps


LAYOUTS = {
    "single": (1, Single, 1, True),
    "single, logits": (1, Single, 8, False),
    "ddp 2": (2, DDP, 2, True),
    "fsdp2 4": (4, FSDP2, 1, True),
    "fsdp2 2 x ulysses 2": (4, lambda: [FSDP2(), Ulysses(2)], 2, True),
    "ddp x ring 2": (2, lambda: [DDP(), ContextParallel(2)], 1, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_tells_the_losses_of_sources(layout, folder, tokenizer, truth):
    ranks, strategies, micro, fused = LAYOUTS[layout]
    runs = run_ranks(steps_of, ranks, folder, tokenizer, strategies(), micro, fused, init=False)
    for found in runs:
        for (loss, metrics), (sums, counts) in zip(found, truth, strict=True):
            for name in SOURCES:
                total, learned = sums[name]
                if learned:
                    assert metrics[f"source_loss/{name}"] == pytest.approx(total / learned, rel=1e-11)
                else:
                    assert metrics[f"source_loss/{name}"] is None
                assert [metrics[f"source_samples/{name}"], metrics[f"source_tokens/{name}"]] == counts[name]
            everything = [sum(values) for values in zip(*sums.values(), strict=True)]
            assert loss == pytest.approx(everything[0] / everything[1], rel=1e-11)
    assert any(sums["rare"][1] == 0 for sums, _ in truth), "a step without one of the sources was meant to be there"


def read_to_the_end(folder, tokenizer):
    launcher = Launcher([FSDP2()], accelerator="cpu", precision="fp64")
    launcher.launch()
    loader = loader_of(folder, tokenizer, parallel=launcher.data_parallel, stopping="all_exhausted")
    model = launcher.setup_model(build_model(tiny_config("llama"), attention="eager"))
    ids = []
    for batch in launcher.track(loader):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        ids.append([name for micro in batch.micro_batches for name in micro.origin.document_ids])
    ended = launcher.checkpoints.last
    launcher.close()
    return ids, ended


def test_ranks_end_a_finite_mixture_together(folder, tokenizer):
    """Ranks learn in the step's agreement that none of them has a document left; no collective is added."""
    ((alone, ended),) = run_ranks(read_to_the_end, 1, folder, tokenizer, init=False)
    assert ended
    for size in (2, 4):
        ranks = run_ranks(read_to_the_end, size, folder, tokenizer, init=False)
        assert [
            sorted(itertools.chain.from_iterable(step)) for step in zip(*(ids for ids, _ in ranks), strict=True)
        ] == [sorted(step) for step in alone]
