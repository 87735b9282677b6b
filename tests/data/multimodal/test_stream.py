"""Conversations with media through a loader: every one once, the same rows on any ranks, workers and after a resume."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tarfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.config.samples import config as config_of
from tests.data.multimodal.files import image_bytes, pixels
from tests.data.multimodal.small_model import save_media, save_model
from tests.data.stream_files import add, jsonl
from veomni.batch.split import WHOLE_ROWS, SequenceShard
from veomni.data import Encoder, StreamLoader, build_dataloader
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.multimodal.images import load_image
from veomni.errors import ConfigError, DataError

ANSWER = {"role": "assistant", "content": "some words"}


def talk(content, **media):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **media}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, media, conversations in JSONL, and others in an archive that holds its pictures itself."""
    folder = tmp_path_factory.mktemp("media")
    save_model(folder / "model")
    save_media(folder / "media")
    rows = [talk(f"<image>what {n}?", images=[("photo.jpg", "chart.png")[n % 2]]) for n in range(8)]
    rows += [talk(f"only words {n}") for n in range(6)]
    rows += [
        talk("<audio>and <image>", audios=["tone.wav"], images=["chart.png"]),
        talk("<video>", videos=["clip.mp4"]),
    ]
    rows[9]["messages"][1] = {**ANSWER, "weight": 0.5}
    jsonl(folder / "talks.jsonl", rows)
    with tarfile.open(folder / "talks.tar", "w") as archive:
        for number in range(6):
            add(archive, f"{number}.json", json.dumps(talk(f"<image>{number}")).encode())
            add(archive, f"{number}.png", image_bytes(Image.fromarray(pixels(40, 60, seed=number))))
    return folder


@pytest.fixture
def setup(folder):
    """What a loader is built from; keywords replace keys of the configuration, by name below ``data``."""

    def build(**changes):
        keys = {
            "data_type": "multimodal", "media": {"root": str(folder / "media"), "image_max_pixels": 5000,
                                                 "video_max_pixels": 5000},
            "max_seq_len": 900, "cache_dir": str(folder / "cache"), "stream_shards": 4, "lookahead": 3,
            "pin_memory": False, "train_path": str(folder / "talks.jsonl"),
        }  # fmt: skip
        config = config_of(
            model__config_path=None, model__train_tokenizer_vocab_size=None, model__model_path=str(folder / "model"),
            train__max_steps=100, train__global_batch_size=4, **{f"data__{k}": v for k, v in (keys | changes).items()},
        )  # fmt: skip
        return config, *config.open_data()

    return build


def loader_of(setup, rank=0, size=1, shard=WHOLE_ROWS, train=True, **changes):
    config, dataset, _ = setup(**changes)
    launcher = SimpleNamespace(data_parallel=(rank, size), sequence_shard=shard)
    return config.build_loader(dataset, config.build_tokenizer(dataset), launcher, train=train)


def facts(step):
    """A step's documents with the values of their pictures and sounds, whatever shares a micro-batch."""
    found = Counter()
    for micro in step:
        found.update(micro.origin.document_ids)
        for key in ("pixel_values", "input_features", "pixel_values_videos"):
            if key in micro:
                found[key] += round(float(micro[key].double().sum()), 3)
    return found


def dealt(ranks, count):
    loops, steps = [iter(rank) for rank in ranks], []
    for _ in range(count):
        step = Counter()
        for loop in loops:
            step.update(facts(next(loop)))
        steps.append({key: round(value, 2) for key, value in step.items()})
    return steps


def test_a_pass_has_every_conversation_once_as_the_collator_packs_it(setup):
    config, dataset, _ = setup()
    loader = loader_of(setup, train=False)
    tokenizer = config.build_tokenizer(dataset)
    transform = config.data.media.build_transform(config, tokenizer)
    samples = [transform(document) for document in dataset]
    names = [f"0/{document.where}" for document in dataset]
    micros = [micro for step in loader for micro in step]
    read = [name for micro in micros for name in micro.origin.document_ids]
    assert sorted(read) == sorted(names)
    collator = MultimodalCollator(transform.family.config, max_seq_len=900, pad_token_id=tokenizer.pad_token_id)
    for micro in micros:
        if not micro.origin.document_ids:
            continue
        truth = collator([[samples[names.index(name)] for name in micro.origin.document_ids]]).fields()
        assert micro.fields().keys() == truth.keys()
        assert ("loss_weights" in micro) == any(name.endswith("line 10") for name in micro.origin.document_ids)
        for key, value in truth.items():
            assert torch.equal(micro[key], value) if isinstance(value, torch.Tensor) else micro[key] == value, key


@pytest.mark.parametrize("workers", [0, 2])
def test_resized_runs_read_what_an_unbroken_one_does(setup, workers):
    whole, found, state = dealt([loader_of(setup)], 6), [], None
    for size in (1, 2, 4):
        ranks = [loader_of(setup, rank, size, num_workers=workers) for rank in range(size)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(state))
        found += dealt(ranks, 2)
        state = json.dumps(StreamLoader.merge_states([rank.state_dict() for rank in ranks]))
    assert found == whole
    assert len(state) < 20_000, "indices, never pictures"


_CLOSED = object()


def _left_in(pipe):
    """What is still in a pipe; ``_CLOSED`` once nobody could write to it, None if that does not happen."""
    try:
        return pipe.recv() if pipe.poll(60) else None
    except EOFError:
        return _CLOSED


def _killed_rank(pipe, build, state):
    loader = build()
    if state is not None:
        loader.load_state_dict(json.loads(state))
    for step in loader:
        pipe.send((facts(step), loader.state_dict()))


def killed_phase(build, size, steps, state):
    """What the ranks received in steps that counted, and the state then; they are killed wherever they are."""
    fork, pipes, ranks = multiprocessing.get_context("fork"), [], []
    for rank in range(size):
        here, there = fork.Pipe(duplex=False)
        ranks.append(fork.Process(target=_killed_rank, args=(there, lambda rank=rank: build(rank, size), state)))
        ranks[-1].start()
        there.close()
        pipes.append(here)
    received = [[pipe.recv() for _ in range(steps)] for pipe in pipes]
    for process in ranks:
        process.kill()
        process.join()
    for pipe in pipes:  # its other end closes with the last of the rank's workers
        assert all(item is not None for item in iter(lambda pipe=pipe: _left_in(pipe), _CLOSED)), "a worker is left"
    merged = [Counter() for _ in range(steps)]
    for of_rank in received:
        for step, (given, _) in zip(merged, of_rank, strict=True):
            step.update(given)
    return merged, json.dumps(StreamLoader.merge_states([of_rank[-1][1] for of_rank in received]))


@pytest.fixture(scope="module")
def damaged(folder):
    """Conversations in files and in an archive; of five, one has an image whose header alone is whole."""
    photo = (folder / "media" / "photo.jpg").read_bytes()
    (folder / "media" / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    names = ["photo.jpg", "chart.png", "cut.jpg", "chart.png", None]
    rows = [
        talk(f"<image>what {n}?", images=[names[n % 5]]) if names[n % 5] else talk(f"only words {n}") for n in range(60)
    ]
    rows += [talk("<audio>", audios=["tone.wav"]), talk("<video>", videos=["clip.mp4"])]
    jsonl(folder / "damaged.jsonl", rows)
    return [
        {"path": str(folder / "damaged.jsonl"), "name": "files", "weight": 3.0},
        {"path": str(folder / "talks.tar"), "name": "archive", "weight": 1.0},
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resized_runs_read_what_an_unbroken_one_does(setup, folder, damaged, workers):
    """Sources of two kinds, mixed by tokens, shuffled, packed, and records left out that turn out to be damaged."""
    media = {"root": str(folder / "media"), "image_max_pixels": 5000, "video_max_pixels": 5000,
             "on_bad_media": "skip"}  # fmt: skip
    options = {"train_path": None, "sources": damaged, "sampling": "token", "streaming": True, "media": media,
               "max_seq_len": 500, "on_overflow": "drop"}  # fmt: skip
    whole = loader_of(setup, **options)
    unbroken, found, state = [facts(step) for step in itertools.islice(whole, 9)], [], None
    for size in (1, 2, 4):
        build = lambda rank, size: loader_of(setup, rank, size, num_workers=workers, **options)  # noqa: E731
        steps, state = killed_phase(build, size, 3, state)
        found += steps

    def rounded(steps):
        return [{key: round(value, 2) for key, value in step.items()} for step in steps]

    assert rounded(found) == rounded(unbroken)
    read = Counter(name for step in found for name in step if "/" in name)
    assert read
    assert max(read.values()) == 1, "every name has its epoch, so none comes twice"
    counts, last = whole.source_counts()["files"], json.loads(state)
    assert counts["dropped"] > 0
    saved = [shard["sources"]["files"] for shard in last["shards"].values()]
    assert sum(progress["dropped"] for progress in saved) == counts["dropped"]
    assert sum(progress["samples"] for progress in saved) == counts["samples"]


def test_media_that_wait_are_not_decoded(setup, monkeypatch):
    loaded = Counter()

    def counting(content, name, limits):
        loaded[name] += 1
        return load_image(content, name, limits)

    monkeypatch.setattr("veomni.data.multimodal.media_decoder.load_image", counting)
    loader = loader_of(setup, lookahead=64, stream_shards=1)
    step = next(iter(loader))
    assert sum(len(micro["image_grid_thw"]) for micro in step if "image_grid_thw" in micro) == loaded.total() > 0
    assert len(loader.state_dict()["shards"]["0"]["waiting"]) > 50


def test_a_file_that_changes_while_it_waits_is_rejected(setup, folder, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(image_bytes(Image.fromarray(pixels(40, 60))))
    path = jsonl(tmp_path / "t.jsonl", [talk(f"<image>{n}", images=["picture.png"]) for n in range(12)])
    media = {"root": str(tmp_path), "image_max_pixels": 5000}
    loader = iter(loader_of(setup, train_path=str(path), media=media, max_seq_len=300, stream_shards=1))
    next(loader)
    picture.write_bytes(image_bytes(Image.fromarray(pixels(60, 90))))
    with pytest.raises(DataError, match=r"t\.jsonl, line \d+, message 1: it is not as large as it was"):
        list(itertools.islice(loader, 3))


def test_archives_and_files_mix(setup, folder):
    sources = [
        {"path": str(folder / "talks.jsonl"), "name": "files", "weight": 1.0},
        {"path": str(folder / "talks.tar"), "name": "archive", "weight": 1.0},
    ]
    loader = loader_of(setup, train_path=None, sources=sources, streaming=True, stream_shards=2, balance=True)
    seen = Counter()
    for step in itertools.islice(loader, 8):
        for micro in step:
            assert micro["source_ids"].shape == micro["input_ids"].shape
            lengths = micro.rows.document_lengths
            ids = micro["source_ids"][micro["source_ids"] >= 0]
            assert ids.bincount(minlength=2).tolist() == [
                sum(length for length, source in zip(lengths, micro.origin.document_sources, strict=True)
                    if source == wanted) for wanted in range(2)
            ]  # fmt: skip
            seen.update(micro.origin.source_names[source] for source in micro.origin.document_sources)
    assert abs(seen["files"] - seen["archive"]) <= 0.2 * seen.total()


TEXTS = {
    "plain": [{"text": "some words that are plain " * (80 if number == 3 else 2)} for number in range(12)],
    "tokenized": [
        {"input_ids": [40 + number, 5, 6, 7], "loss_weights": [1, 0.5, 0, 1.0 + number % 2]} for number in range(12)
    ],
    "preference": [{"prompt": f"what {number}?", "chosen": "some", "rejected": "none"} for number in range(12)],
}  # fmt: skip


def documents_by_name(loader, count, kinds):
    """Tokens, labels and weights of every document of some sources, by its name."""
    found = {}
    for step in itertools.islice(loader, count):
        for micro in step:
            if not micro.origin.document_ids:
                continue
            columns = [
                micro["input_ids"][0],
                micro["labels"][0],
                micro.fields().get("loss_weights", torch.ones(1, 900))[0],
            ]
            lengths = micro.rows.document_lengths
            pieces = zip(*(column[: sum(lengths)].split(lengths) for column in columns),
                         strict=True)  # fmt: skip
            for name, source, piece in zip(
                micro.origin.document_ids, micro.origin.document_sources, pieces, strict=True
            ):
                if micro.origin.source_names[source] in kinds:
                    ids, labels, weights = (value.tolist() for value in piece)
                    supervised = [weight if label >= 0 else None for weight, label in zip(weights, labels, strict=True)]
                    found[micro.origin.source_names[source], name] = ids, labels, supervised
    return found


def test_texts_mix_with_media(setup, folder, tmp_path):
    """A text becomes in a mixture with media what it becomes without, whatever its kind."""
    kinds = {"plain": "plaintext", "tokenized": "pretokenized", "preference": "preference"}
    texts = [
        {"path": str(jsonl(tmp_path / f"{name}.jsonl", rows)), "name": name, "data_type": kinds[name]}
        for name, rows in TEXTS.items()
    ]
    media = {"path": str(folder / "talks.jsonl"), "name": "talks", "data_type": "multimodal"}
    options = {
        "train_path": None,
        "stopping_strategy": "once",
        "stream_shards": 1,
        "on_overflow": "truncate",
        "data_type": "plaintext",
    }
    mixed = loader_of(setup, sources=[media, *texts], **options)
    found = documents_by_name(mixed, 30, kinds)
    plain = {**options, "media": {}}
    assert found == documents_by_name(loader_of(setup, sources=texts, **plain), 30, kinds)
    assert len(found) == 12 + 12 + 24
    assert max(len(ids) for ids, _, _ in found.values()) == 900, "a text is cut"
    assert {weight for _, _, weights in found.values() for weight in weights} == {None, 0.5, 1.0, 2.0}
    with pytest.raises(DataError, match=r"more than max_seq_len.*\n.*set on_overflow to drop$"):  # media are not
        list(itertools.islice(loader_of(setup, sources=[media, *texts], max_seq_len=150, **options), 30))


def test_a_row_has_no_more_media_than_allowed(setup):
    def media_of_rows(loader):
        """For every row, the tokens of each document that stand for media."""
        family = loader.plan.samples._transform.family
        stand_ins = torch.tensor(sorted(family.unsupervised))
        for step in itertools.islice(loader, 6):
            for micro in step:
                documents = micro["input_ids"][0, : sum(micro.rows.document_lengths)].split(micro.rows.document_lengths)
                yield [int(torch.isin(ids, stand_ins).sum()) for ids in documents]

    def most(rows):
        return max(sum(row) for row in rows if sum(count > 0 for count in row) > 1)

    options = {"lookahead": 16, "stream_shards": 1}
    assert most(media_of_rows(loader_of(setup, **options))) > 200
    bound = list(media_of_rows(loader_of(setup, max_media_tokens=200, **options)))
    assert 100 < most(bound) <= 200
    assert any(0 in row for row in bound), "words fill what is left"


def test_ranks_that_share_rows_get_their_parts(setup):
    whole = next(iter(loader_of(setup)))
    parts = [next(iter(loader_of(setup, shard=SequenceShard(2, rank)))) for rank in range(2)]
    for micro, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([left["input_ids"], right["input_ids"]], 1), micro["input_ids"])
        assert left.origin.document_ids == micro.origin.document_ids


def test_an_empty_row_is_only_padding(setup):
    loader = loader_of(setup, train=False)
    *_, last = loader
    empty = [micro for micro in last if not micro.origin.document_ids]
    assert empty
    assert all((micro["labels"] == -100).all() for micro in empty)
    assert all(micro["position_ids"].shape == last[0]["position_ids"].shape for micro in empty)


def test_what_is_too_long_is_an_error_or_left_out_and_counted(setup):
    with pytest.raises(DataError, match=r"talks\.jsonl, line \d+: \d+ tokens, more than max_seq_len 60"):
        list(itertools.islice(loader_of(setup, max_seq_len=60), 2))
    loader = loader_of(setup, max_seq_len=200, on_overflow="drop")
    list(itertools.islice(loader, 3))
    assert loader.source_counts()["data"]["dropped"] > 0
    for policy in ("split", "truncate"):
        with pytest.raises(ConfigError, match="would cut media apart"):
            loader_of(setup, on_overflow=policy)


def test_bad_media_are_left_out_where_that_is_allowed(setup, folder, tmp_path):
    rows = [talk(f"<image>{n}", images=["gone.png" if n == 3 else "chart.png"]) for n in range(8)]
    path = str(jsonl(tmp_path / "t.jsonl", rows))
    media = {"root": str(folder / "media"), "image_max_pixels": 5000}
    with pytest.raises(DataError, match=r"line 4, message 1: gone\.png"):
        list(loader_of(setup, train=False, train_path=path, media=media))
    loader = loader_of(setup, train=False, train_path=path, media={**media, "on_bad_media": "skip"})
    for _ in range(2):
        assert sum(len(micro.origin.document_ids) for step in loader for micro in step) == 7


def test_samples_need_their_maker(setup):
    config, dataset, _ = setup()
    with pytest.raises(ConfigError, match=r"Encoder\(media="):
        build_dataloader(dataset, Encoder(config.build_tokenizer(dataset)))
