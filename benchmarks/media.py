"""Images per second of the multimodal pipeline beside a plain Hugging Face `datasets` + processor loop, in one run.

    python benchmarks/media.py
    python benchmarks/media.py --images 24 --repeat 1

Writes photographs (JPEG, quality 90, 640 x 480 to 1280 x 960) and conversations about 1 to 3 of them, one in five
without any, to a temporary directory, and reads all of it once with each pipeline, which does nothing else:

- the plain loop is `datasets.load_dataset("json")`, a `torch` DataLoader, and a collate function that opens images and
  calls transformers' Qwen2.5-VL processor on four conversations, padded to the longest;
- ours is what a configuration builds: rows of 8192 tokens, packed; also with the feature cache on disk, empty and full.

Both use transformers' image processor for Pillow: the one for torchvision is not measured, as torchvision is not needed
here. Token ids and pixels of some conversations are compared first, bit for bit. Each measurement has a process of its
own; the best of several is shown. CPU time is of all its processes; peak memory is resident, of the loop and of the
largest worker.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.split import WHOLE_ROWS
from veomni.data import CHAT_TEMPLATES, train_byte_bpe
from veomni.run_config import Config

ROW = 8192  # tokens
TOGETHER = 4  # conversations in a batch of the plain loop
SIZES = [(640, 480), (800, 600), (1024, 768), (1280, 720), (1280, 960)]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
IDS = {f"{name}_token_id": f"<|{text}|>" for name, text in (
    ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")
)}  # fmt: skip
WORDS = ["the", "picture", "shows", "houses", "beside", "water", "while", "light", "falls", "and", "someone", "walks"]


# ---------------------------------------------------------------- data


def photograph(random_numbers: np.random.Generator) -> bytes:
    """Return a JPEG that compresses as photographs do: broad shapes, some edges, and the noise of a sensor."""
    width, height = SIZES[random_numbers.integers(len(SIZES))]
    if random_numbers.random() < 0.3:
        width, height = height, width
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 90), (16, 40), (90, 16)):
        coarse = random_numbers.integers(0, 256, (cells, cells, 3), np.uint8)
        picture += strength / 128 * (np.asarray(Image.fromarray(coarse).resize((width, height), 3), np.float32) - 128)
    picture += 128 + random_numbers.normal(0, 4, (height, width, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_data(folder: Path, images: int) -> dict[str, Any]:
    drawn, numbers = random.Random(0), np.random.default_rng(0)
    lines, written, size = [], 0, 0
    while written < images:
        count = 0 if drawn.random() < 0.2 else min(drawn.randint(1, 3), images - written)
        names = [f"{written + number}.jpg" for number in range(count)]
        for name in names:
            size += (folder / name).write_bytes(photograph(numbers))
        written += count
        question, answer = (" ".join(drawn.choices(WORDS, k=drawn.randint(5, most))) for most in (30, 200))
        lines.append({
            "messages": [{"role": "user", "content": "<image>" * count + question},
                         {"role": "assistant", "content": answer}],
            "images": names,
        })  # fmt: skip
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"conversations": len(lines), "mib": size / 2**20}


def write_model(folder: Path) -> None:
    tokenizer = train_byte_bpe([" ".join(WORDS)] * 4, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    config = Qwen2_5_VLConfig()
    for key, token in IDS.items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    config.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES.get("qwen-vl"))


# ---------------------------------------------------------------- the two pipelines

Read = Iterator[tuple[int, int, int]]  # images, tokens without padding, tokens with it


class PlainLoop:
    """What people write."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, configuration(folder, 0, 0).build_tokenizer(None)
        image_processor = Qwen2VLImageProcessorPil()
        # Its constructor also wants a video processor, which needs torchvision.
        self.processor = object.__new__(Qwen2_5_VLProcessor)
        vars(self.processor).update(
            tokenizer=self.tokenizer, image_processor=image_processor, video_processor=None, feature_extractor=None
        )
        for key, token in IDS.items():
            vars(self.processor).update({key.removesuffix("_id"): token, key: self.tokenizer.vocab[token]})

    def batch(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts, images = [], []
        for record in records:
            opened = [Image.open(self.folder / name).convert("RGB") for name in record["images"]]
            parts = [{"type": "image"}] * len(opened)
            messages = [dict(message) for message in record["messages"]]
            question = messages[0]["content"].replace("<image>", "")
            messages[0]["content"] = [*parts, {"type": "text", "text": question}]
            texts.append(self.tokenizer.apply_chat_template(messages, tokenize=False))
            images += opened
        batch = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[(batch["attention_mask"] == 0) | (labels == self.processor.image_token_id)] = IGNORE_INDEX
        return {**batch, "labels": labels}

    def __call__(self, workers: int) -> Read:
        records = load_dataset(
            "json", data_files=str(self.folder / "talks.jsonl"), split="train", cache_dir=str(self.folder / "arrow")
        )
        loader = DataLoader(
            records, batch_size=TOGETHER, shuffle=True, num_workers=workers, collate_fn=self.batch,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        for batch in loader:
            mask = batch["attention_mask"]
            yield len(batch.get("image_grid_thw", ())), int(mask.sum()), mask.numel()


def configuration(folder: Path, workers: int, cache_gib: float) -> Config:
    values = {
        "model": {"model_path": str(folder)},
        "data": {
            "train_path": str(folder / "talks.jsonl"), "data_type": "multimodal", "max_seq_len": ROW,
            "stopping_strategy": "all_exhausted", "stream_shards": 4, "num_workers": workers,
            "cache_dir": str(folder / "cache"),
            "media": {"root": str(folder), "cache_gib": cache_gib},
        },
        "train": {"global_batch_size": 1, "num_train_epochs": 1, "output_dir": str(folder), "precision": "fp32"},
    }  # fmt: skip
    return Config.model_validate(yaml.safe_load(yaml.safe_dump(values)))


def ours(folder: Path, workers: int, cache_gib: float = 0) -> Read:
    config = configuration(folder, workers, cache_gib)
    dataset, _ = config.open_data()
    layout = SimpleNamespace(data_parallel=(0, 1), sequence_shard=WHOLE_ROWS)
    for step in config.build_loader(dataset, config.build_tokenizer(dataset), layout, train=True):
        for micro in step:
            yield (
                len(micro.inputs.get("image_grid_thw", ())),
                sum(micro.rows.document_lengths),
                micro["input_ids"].numel(),
            )


def compare(folder: Path, count: int = 6) -> int:
    """Compare the samples of the first conversations, and return how many."""
    config = configuration(folder, 0, 0)
    dataset, _ = config.open_data()
    transform, plain = config.data.media.build_transform(config, config.build_tokenizer(dataset)), PlainLoop(folder)
    for document in (dataset[number] for number in range(min(count, len(dataset)))):
        sample, expected = transform(document), plain.batch([document.record])
        assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist(), "other tokens"
        for key in ("pixel_values", "image_grid_thw"):
            assert (key in sample) == (key in expected)
            assert key not in sample or torch.equal(sample[key], expected[key]), f"other {key}"
    return min(count, len(dataset))


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    seconds: float
    first: float  # seconds until the first batch
    cpu: float  # seconds, of all processes
    images: int
    tokens: int
    places: int
    loop_mib: float
    worker_mib: float


def measure(folder: Path, name: str, workers: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    started, first = time.perf_counter(), 0.0
    totals = [0, 0, 0]
    plain = name == "plain loop"
    read = PlainLoop(folder)(workers) if plain else ours(folder, workers, 1000 if "cache" in name else 0)
    for found in read:
        first = first or time.perf_counter() - started
        totals = [total + number for total, number in zip(totals, found, strict=True)]
    seconds = time.perf_counter() - started
    del read
    gc.collect()  # ends the workers
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    pipe.send(Measured(seconds, first, cpu, *totals, own.ru_maxrss / 1024, children.ru_maxrss / 1024))


def in_a_process(folder: Path, name: str, workers: int) -> Measured:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=measure, args=(folder, name, workers, there))
    process.start()
    there.close()
    measured: Measured = here.recv()
    process.join()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", default="0,2", help="numbers of worker processes")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", choices=["plain loop", "ours"], help="measure one pipeline, without the cache")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the processes that are forked may not find threads begun
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_data(folder, args.images)
        write_model(folder)
        print(f"{args.images} JPEGs of {written['mib'] / args.images * 1024:.0f} KiB on average in "
              f"{written['conversations']} conversations; {compare(folder)} of them compared: "
              "same token ids, pixels equal bit for bit; image processor: transformers' for Pillow")  # fmt: skip
        numbers = [int(number) for number in args.workers.split(",")]
        runs = [(name, number) for number in numbers for name in ("plain loop", "ours") if args.only in (None, name)]
        if args.only is None:
            runs += [("ours, cache empty", numbers[-1]), ("ours, cache full", numbers[-1])]
        table(runs, args.repeat, folder, written["conversations"])


def table(runs: list[tuple[str, int]], repeat: int, folder: Path, conversations: int) -> None:
    best: dict[tuple[str, int], Measured] = {}
    for turn in range(repeat):
        for run in runs:
            if run[0] == "ours, cache empty" and turn:
                continue  # it no longer is
            measured = in_a_process(folder, *run)
            if run not in best or measured.seconds < best[run].seconds:
                best[run] = measured
    print("| pipeline | workers | images/s | times plain | conversations/s | tokens/s | fill | CPU ms per image | "
          "first batch, s | peak MiB: loop | a worker |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (name, workers), found in best.items():
        plain = best.get(("plain loop", workers))
        times = "" if plain is None else f"{plain.seconds / found.seconds:.2f}"
        worker = f"{found.worker_mib:.0f}" if workers else ""
        print(f"| {name} | {workers} | {found.images / found.seconds:.1f} | {times} | "
              f"{conversations / found.seconds:.1f} | {found.tokens / found.seconds:.0f} | "
              f"{100 * found.tokens / found.places:.1f} % | {1000 * found.cpu / found.images:.1f} | "
              f"{found.first:.1f} | {found.loop_mib:.0f} | {worker} |")  # fmt: skip


if __name__ == "__main__":
    main()
