"""Held-out losses and right answers of every source, in every layout, equal those of documents by themselves."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from tests.data.loaders import dataset_of, make_loader
from tests.data.stream_files import jsonl
from tests.data.test_source_losses import LAYOUTS
from tests.models.tiny import tiny_config
from veomni.batch.documents import RowLayout, document_numbers
from veomni.batch.fields import IGNORE_INDEX
from veomni.data import DataSource, RecordSchema, build_mixture
from veomni.errors import DataError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import Single
from veomni.strategies.transforms.float64 import Float64Throughout
from veomni.testing.oracle import initial_model
from veomni.testing.ranks import RankFailed, run_ranks

COUNTS = {"sums": 11, "long": 7, "rare": 2}
ROW = 32


def predictable(model, ids):
    """The likeliest token after each, from documents by themselves."""
    with torch.no_grad(), Float64Throughout():
        return model(input_ids=ids[None], use_cache=False).logits[0].double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token ids whose answers the untrained model gives itself, so that about half of them are right."""
    folder, draw = tmp_path_factory.mktemp("held-out"), torch.Generator().manual_seed(7)
    model = initial_model(tiny_config("llama"), "cpu")
    for name, count in COUNTS.items():
        rows = []
        for number in range(count):
            ids = torch.randint(3, 128, (9 if name == "long" else 5,), generator=draw)
            for _ in range(1 + number % 4):
                ids = torch.cat([ids, predictable(model, ids)[-1:].argmax(-1)])
            answer = len(ids) - 1 - number % 4
            if number % 2:
                ids[-1] = (ids[-1] + 1) % 128
            labels = torch.where(torch.arange(len(ids)) >= answer, ids, IGNORE_INDEX)
            rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        rows.append({"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX] * 3})  # read only: it counts nowhere
        jsonl(folder / f"{name}.jsonl", rows)
    return folder


def held_out(folder):
    sources = [DataSource(str(folder / f"{name}.jsonl"), name, schema=RecordSchema("pretokenized")) for name in COUNTS]
    return build_mixture(sources, streaming=False, cache_dir=folder / "cache")


def evaluated(folder, tokenizer, strategies, micro_batch_size, fused):
    launcher = Launcher(strategies, accelerator="cpu", precision="fp64")
    launcher.launch()
    rank, size = launcher.data_parallel
    loader = make_loader(
        held_out(folder), tokenizer, rank=rank, size=size, shard=launcher.sequence_shard, held_out=True,
        micro_batch_size=micro_batch_size, global_batch_size=8, max_seq_len=ROW, cache_dir=folder / "cache",
        pin_memory=False, lookahead=4,
    )  # fmt: skip
    model = launcher.setup_model(build_model(tiny_config("llama"), attention="eager"), fused_loss=fused)
    twice = [launcher.evaluate(model, loader, answers=True) for _ in range(2)]
    assert twice[0] == twice[1]
    assert "eval_accuracy" not in launcher.evaluate(model, loader)
    launcher.close()
    return twice[0]


@pytest.fixture(scope="module")
def truth(folder):
    model = initial_model(tiny_config("llama"), "cpu")
    sums, answers = defaultdict(lambda: [0.0, 0]), defaultdict(list)
    dataset = held_out(folder)
    for source in dataset.sources:
        loaded = dataset_of(str(folder / f"{source.name}.jsonl"), data_type="pretokenized")
        for document in loaded:
            ids, labels = (torch.tensor(document.record[key]) for key in ("input_ids", "labels"))
            logits, targets = predictable(model, ids)[:-1], labels[1:]
            kept = targets != IGNORE_INDEX
            sums[source.name][0] += float(F.cross_entropy(logits, targets, reduction="sum")) if kept.any() else 0.0
            sums[source.name][1] += int(kept.sum())
            if kept.any():
                answers[source.name].append(bool((logits.argmax(-1) == targets)[kept].all()))
    total = [sum(values) for values in zip(*sums.values(), strict=True)]
    everything = [right for group in answers.values() for right in group]
    assert 0.3 < sum(everything) / len(everything) < 0.7
    found = {"eval_loss": total[0] / total[1], "perplexity": math.exp(total[0] / total[1])}
    found["eval_accuracy"] = sum(everything) / len(everything)
    for name in COUNTS:
        found[f"eval_loss/{name}"] = sums[name][0] / sums[name][1]
        found[f"eval_accuracy/{name}"] = sum(answers[name]) / len(answers[name])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_as_documents_by_themselves(layout, folder, tokenizer, truth):
    ranks, strategies, micro, fused = LAYOUTS[layout]
    for found in run_ranks(evaluated, ranks, folder, tokenizer, strategies(), micro, fused, init=False):
        assert found == pytest.approx(truth, rel=1e-11)


def test_every_document_is_read_once_whatever_the_sizes_of_sources(folder, tokenizer):
    for size in (1, 2, 4):
        names = []
        for rank in range(size):
            loader = make_loader(
                held_out(folder), tokenizer, rank=rank, size=size, global_batch_size=4, max_seq_len=ROW, held_out=True,
                cache_dir=folder / "cache", pin_memory=False,
            )  # fmt: skip
            names += [
                (micro.origin.source_names[source], name)
                for step in loader for micro in step
                for name, source in zip(micro.origin.document_ids, micro.origin.document_sources, strict=True)
            ]  # fmt: skip
        assert len(names) == len(set(names)) == sum(COUNTS.values()) + len(COUNTS)


def own_loss():
    from types import SimpleNamespace

    class Model(torch.nn.Linear):
        def forward(self, input_ids, **rest):
            return SimpleNamespace(loss=super().forward(input_ids.float()).sum())

    launcher = Launcher(Single(), accelerator="cpu")
    launcher.launch()
    model = launcher.setup_model(Model(4, 1))
    ids = torch.ones(2, 4, dtype=torch.int64)
    launcher.evaluate(model, [[{"input_ids": ids, "labels": ids}]], answers=True)


def test_a_model_with_a_loss_of_its_own_is_not_scored():
    with pytest.raises(RankFailed, match="predictions of Model are unavailable"):
        run_ranks(own_loss, 1, init=False)


def test_numbers_of_documents_without_packing():
    """Padded on either side, every row is a document; of rows that nobody described, nothing is guessed."""
    ids = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert document_numbers(inputs, RowLayout.of(inputs)).tolist() == [[0] * 4, [1] * 4]
    with pytest.raises(DataError, match="row_lengths"):
        document_numbers(inputs, RowLayout((1, 2, 3)))
    assert document_numbers(inputs, RowLayout((1, 2, 3), (3, 3))).tolist() == [[0, 1, 1, -1], [2, 2, 2, -1]]
