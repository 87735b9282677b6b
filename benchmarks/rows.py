"""The rows of benchmarks/scale.py: which model, which batch, and how ranks share both; the same for every library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parents[1] / "configs/model_configs"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: A file of configs/model_configs.
        length: Tokens of a row; ``rows`` of them a step and data rank.
        layers: Layers instead of the model's own.
        experts, ulysses, ring: Ranks of each axis; 0 leaves the axis out, -1 is the number of GPUs.
        recompute: Activation checkpointing.
        packed: Rows hold documents of log-normal lengths with this median.
        chats: Packed conversations of such lengths, tokenized and packed by the library's own loader.
        images: Number of photographs in conversations, decoded and packed by that loader while training.
        reduce: Format that gradients are summed in.
        prefetch, offload: Options of FSDP2.
        inputs_offloaded: Keep inputs of recomputed blocks in host memory.
        tile: Tokens of a tile of the MLP; 0 does not tile it.
        optimizer: "adamw" is PyTorch's, fused; else a name of ``train.optimizer``.
        float8: The recipe that linear layers of blocks are computed with in float8.
        compile: Compile blocks, where the library does.
    """

    model: str
    rows: int
    length: int
    layers: int | None = None
    experts: int = 0
    ulysses: int = 0
    ring: int = 0
    overlap: bool = False
    recompute: str = "none"
    packed: int = 0
    chats: bool = False
    images: int = 0
    attention: str = "auto"
    reduce: str = "fp32"
    prefetch: int = 0
    offload: bool = False
    optimizer: str = "adamw"
    float8: str = ""
    inputs_offloaded: bool = False
    tile: int = 0
    compile: bool = True


def long(model, length, **options):
    """A long row with full recomputation, offloaded block inputs and tiled MLPs."""
    return Row(model, 1, length, recompute="full", inputs_offloaded=True, **{"tile": 8192, **options})


ROWS = {
    "tiny": Row("tiny_qwen3", 2, 64),
    "tiny_eager": Row("tiny_qwen3", 2, 64, compile=False),
    "tiny_chats": Row("tiny_qwen3", 2, 256, packed=30, chats=True),
    "tiny_images": Row("tiny_qwen3_vl", 1, 4096, images=40, compile=False),
    "tiny_ulysses": Row("tiny_qwen3", 1, 128, ulysses=2, recompute="full"),
    "tiny_ring": Row("tiny_qwen3", 1, 128, ring=2, recompute="full", packed=20),
    "tiny_float8": Row("tiny_qwen3", 2, 64, float8="tensorwise"),
    "tiny_bf16_states": Row("tiny_qwen3", 2, 64, optimizer="adamw_bf16"),
    "tiny_moe_ep": Row("tiny_qwen3_moe", 2, 64, experts=-1),
    "dense": Row("qwen3_1.7b", 4, 4096),
    "dense_reduce_bf16": Row("qwen3_1.7b", 4, 4096, reduce="bf16"),
    "dense_prefetch1": Row("qwen3_1.7b", 4, 4096, prefetch=1),
    "dense_prefetch2": Row("qwen3_1.7b", 4, 4096, prefetch=2),
    "dense_offload": Row("qwen3_1.7b", 4, 4096, offload=True),
    "dense_ulysses1": Row("qwen3_1.7b", 4, 4096, ulysses=1),
    "dense_muon": Row("qwen3_1.7b", 4, 4096, optimizer="muon"),
    "dense_bf16_states": Row("qwen3_1.7b", 4, 4096, optimizer="adamw_bf16"),
    "dense_8bit": Row("qwen3_1.7b", 4, 4096, optimizer="adamw_8bit"),
    "dense_float8": Row("qwen3_1.7b", 4, 4096, float8="tensorwise"),
    "dense_float8_rowwise": Row("qwen3_1.7b", 4, 4096, float8="rowwise"),
    "dense_8b_float8": Row("qwen3_8b", 2, 4096, recompute="full", float8="tensorwise"),
    "dense_packed": Row("qwen3_1.7b", 4, 4096, packed=600),
    "dense_chats": Row("qwen3_1.7b", 4, 4096, packed=600, chats=True),
    "vlm_images": Row("qwen2_5_vl_7b", 1, 8192, layers=4, recompute="full", images=240),
    "dense_8b": Row("qwen3_8b", 2, 4096, recompute="full"),
    "dense_8b_selective": Row("qwen3_8b", 2, 4096, recompute="selective"),
    "moe2": Row("qwen3_30b_a3b", 4, 4096, layers=2),
    "moe2_ep": Row("qwen3_30b_a3b", 4, 4096, layers=2, experts=-1),
    "moe6": Row("qwen3_30b_a3b", 4, 4096, layers=6),
    "moe8": Row("qwen3_30b_a3b", 4, 4096, layers=8),
    "moe8_ep": Row("qwen3_30b_a3b", 4, 4096, layers=8, experts=-1),
    "moe8_ep_prefetch2": Row("qwen3_30b_a3b", 4, 4096, layers=8, experts=-1, prefetch=2),
    "moe12_ep": Row("qwen3_30b_a3b", 4, 4096, layers=12, experts=-1),
    "ulysses": Row("qwen3_1.7b", 1, 131_072, ulysses=-1, recompute="full"),
    "ulysses_overlap": Row("qwen3_1.7b", 1, 131_072, ulysses=-1, overlap=True, recompute="full"),
    "ring": Row("qwen3_1.7b", 1, 131_072, ring=-1, recompute="full"),
    "ring2_ulysses": Row("qwen3_1.7b", 1, 131_072, ring=2, ulysses=2, recompute="full"),
    "ulysses_packed": Row("qwen3_1.7b", 1, 131_072, ulysses=-1, recompute="full", packed=4000),
    "ring_packed": Row("qwen3_1.7b", 1, 131_072, ring=-1, recompute="full", packed=4000),
    "ulysses_4b_64k": Row("qwen3_4b", 1, 65_536, ulysses=-1, recompute="full"),
    "ulysses_4b_128k": Row("qwen3_4b", 1, 131_072, ulysses=-1, recompute="full"),
    "tiny_long": long("tiny_qwen3", 4096, tile=512),
    "tiny_long_ulysses": long("tiny_qwen3", 4096, ulysses=-1, tile=512),
    "long_1gpu_131k_full": Row("qwen3_1.7b", 1, 131_072, recompute="full"),
    "long_1gpu_131k_offload": long("qwen3_1.7b", 131_072, tile=0),
    "long_1gpu_131k": long("qwen3_1.7b", 131_072),
    "long_1gpu_262k": long("qwen3_1.7b", 262_144),
    "long_1gpu_512k": long("qwen3_1.7b", 524_288),
    "long_1gpu_131k_2layers": long("qwen3_1.7b", 131_072, layers=2),
    "long_1gpu_512k_4layers": long("qwen3_1.7b", 524_288, layers=4),
    "long_1gpu_768k_4layers": long("qwen3_1.7b", 786_432, layers=4),
    "long_4b_64k": long("qwen3_4b", 65_536, ulysses=-1),
    "long_4b_128k": long("qwen3_4b", 131_072, ulysses=-1),
    "long_4b_256k": long("qwen3_4b", 262_144, ulysses=-1),
    "long_8b_512k": long("qwen3_8b", 524_288, ulysses=-1),
    "long_8b_512k_8layers": long("qwen3_8b", 524_288, ulysses=-1, layers=8),
    "long_8b_2m_4layers": long("qwen3_8b", 2_097_152, ulysses=-1, layers=4),
    "long_32k": Row("qwen3_1.7b", 1, 32_768, recompute="full"),
}


def build_config(row):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODELS / f"{row.model}.json")
    text = config.get_text_config()
    text.num_hidden_layers = row.layers or text.num_hidden_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    text.max_position_embeddings = max(row.length, text.max_position_embeddings)
    text.use_cache = False
    return config


def only_ours(row):
    """The reason why a row is run with this library only, by an option that no peer is set up for; else ""."""
    if row.chats or row.images:
        return "no loader that packs conversations"
    if row.optimizer != "adamw":
        return f"no {row.optimizer}"
    if row.reduce != "fp32":
        return f"no reduction in {row.reduce}"
    if row.float8:
        return "float8 is not set up here"
    return "no offload of block inputs, no tiled MLPs" if row.inputs_offloaded or row.tile else ""


def ranks_of(size, gpus):
    """Ranks of an axis, at least one."""
    return gpus if size == -1 else max(size, 1)


def document_lengths(total, typical, generator):
    """Lengths of documents that fill ``total`` tokens: log-normal with median ``typical`` and sigma 1."""
    import torch

    lengths = []
    while sum(lengths) < total:
        drawn = int(math.exp(math.log(typical) + float(torch.randn((), generator=generator))))
        lengths.append(min(max(drawn, 8), total - sum(lengths)))
    return lengths


def micro_batch(row, vocabulary, seed):
    """Random rows; the positions of a packed row start again with each document."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (row.rows, row.length), generator=generator)
    if not row.packed:
        positions = torch.arange(row.length).expand_as(ids).contiguous()
        return {"input_ids": ids, "labels": ids, "position_ids": positions}
    lengths = document_lengths(ids.numel(), row.packed, generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1), "position_ids": positions.view(1, -1)}
