"""The decoders of composed models."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veomni.batch.fields import FIELDS, IGNORE_INDEX
from veomni.families.omni import DECODERS, Decoder


@DECODERS.register("codes")
class Codes(Decoder):
    """Image tokens: entries of a codebook (a VQ tokenizer's), predicted one after another.

    A document brings ``codes`` int64 ``[seq]``, the entry at each image token and -100 elsewhere; the embedding of an
    entry has ``channels``.
    """

    keys = ("codes", "codes_next")

    def __init__(self, hidden_size: int, *, codebook_size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, channels)
        self.projection = nn.Linear(channels, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, codebook_size, bias=False)

    @staticmethod
    def read(values: Any, **options: Any) -> dict[str, Tensor]:
        """Return ``codes`` for a list of entries of the codebook."""
        size = options["codebook_size"]
        entries = values if isinstance(values, list) else []
        if not entries or not all(type(entry) is int and 0 <= entry < size for entry in entries):
            raise ValueError(f"give a list of entries of the codebook, 0 to {size - 1}")
        return {"codes": torch.tensor(entries)}

    @staticmethod
    def document(sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``codes_next`` ``[seq]``: the entry that follows, -100 where none does."""
        return {"codes_next": _following(sample["codes"], IGNORE_INDEX)}

    def place(self, embeds: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Put the embeddings of entries at their tokens."""
        codes = _field(batch, "codes", embeds)
        there = codes >= 0
        placed = self.projection(self.embedding(codes[there]))
        return embeds.masked_scatter(there.unsqueeze(-1), placed.to(embeds.dtype))

    def loss(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of the entries that follow."""
        targets = _field(batch, "codes_next", hidden)
        supervised = targets >= 0
        logits = self.head(self.norm(hidden[supervised]))
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return F.cross_entropy(wide, targets[supervised], reduction="sum") / supervised.sum().clamp(min=1)


@DECODERS.register("latents")
class Latents(Decoder):
    """Continuous image latents by flow matching, each token's conditioned on the hidden state before it.

    Rectified flow (Liu et al., 2022, arXiv:2209.03003) with a small network per token (Li et al., 2024,
    arXiv:2406.11838): between noise ``n`` at time 0 and the latent ``x`` at time 1 the point ``(1 - t) n + t x`` moves
    with the velocity ``x - n``, which is predicted.

    A document brings ``latents`` float32 ``[seq, channels]`` and ``latents_time`` float32 ``[seq]``: any number that is
    not negative at the tokens of latents, negative elsewhere. The network has ``depth`` residual layers of ``width``.
    """

    keys = ("latents", "latents_next", "latents_noise", "latents_place", "latents_time")

    def __init__(self, hidden_size: int, *, channels: int, width: int, depth: int = 2) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, hidden_size)
        self.condition = nn.Linear(hidden_size, width)
        self.time = nn.Linear(width, width)
        self.noisy = nn.Linear(channels, width)
        self.layers = nn.ModuleList(_Residual(width) for _ in range(depth))
        self.velocity = nn.Linear(width, channels)

    @staticmethod
    def read(values: Any, **options: Any) -> dict[str, Tensor]:
        """Return ``latents`` and ``latents_time`` for a list of latents of finite channels."""
        problem = f"give a list of latents, each a list of {options['channels']} finite numbers"
        try:
            latents = torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(problem) from error
        if latents.dim() != 2 or latents.shape[1] != options["channels"] or not bool(latents.isfinite().all()):
            raise ValueError(problem)
        return {"latents": latents, "latents_time": torch.zeros(len(latents))}

    @staticmethod
    def document(sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the latent that follows, its noise and its time in (0, 1), all drawn from the document's seed.

        ``noise_seed`` of the sample makes another draw of the same document; without it, its content decides.
        """
        latents, place = sample["latents"], sample["latents_time"]
        content = sample["input_ids"].numpy().tobytes() + latents.float().numpy().tobytes()
        seed = hashlib.sha256(content + str(sample.get("noise_seed", "")).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
        noise = torch.randn(latents.shape, generator=generator).to(latents.dtype)
        follows = _following(place, -1.0)
        drawn = torch.rand(len(latents), generator=generator).to(follows.dtype)
        time = torch.where(follows >= 0, drawn, follows)
        following = _following(latents, 0.0)
        return {"latents_place": place, "latents_next": following, "latents_noise": noise, "latents_time": time}

    def place(self, embeds: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Put projected latents at their tokens."""
        there = _field(batch, "latents_place", embeds) >= 0
        latents = _field(batch, "latents", embeds, self.projection.in_features)
        placed = self.projection(latents[there].to(embeds.dtype))
        return embeds.masked_scatter(there.unsqueeze(-1), placed.to(embeds.dtype))

    def loss(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the squared error of the velocity, averaged over channels and tokens."""
        time = _field(batch, "latents_time", hidden)
        supervised = time >= 0
        latents, noise = (
            _field(batch, key, hidden, self.projection.in_features)[supervised].to(hidden.dtype)
            for key in ("latents_next", "latents_noise")
        )
        moment = time[supervised].to(hidden.dtype)[:, None]
        state = self.noisy((1 - moment) * noise + moment * latents) + self.condition(hidden[supervised])
        state = state + self.time(_waves(moment, self.time.in_features))
        for layer in self.layers:
            state = layer(state)
        error = self.velocity(F.silu(state)) - (latents - noise)
        return error.square().mean(-1).sum() / supervised.sum().clamp(min=1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        result: Tensor = state + self.linear_2(F.silu(self.linear_1(self.norm(state))))
        return result


def _field(batch: Mapping[str, Tensor], key: str, like: Tensor, *channels: int) -> Tensor:
    """Return a field ``[batch, seq, ...]`` of a batch, or its padding: then no token is this decoder's."""
    absent = (*like.shape[:2], *channels)
    return batch[key] if key in batch else torch.full(absent, FIELDS.get(key).pad, device=like.device)


def _following(values: Tensor, fill: float) -> Tensor:
    """Return what comes next at each token of a document."""
    return torch.cat([values[1:], torch.full_like(values[:1], fill)])


def _waves(moment: Tensor, width: int) -> Tensor:
    """Return sines and cosines of times ``[tokens, 1]``, ``[tokens, width]``."""
    half = width // 2
    exponents = torch.arange(half, device=moment.device, dtype=moment.dtype) / max(1, half)
    angles = moment * 1000.0 * torch.exp(-math.log(10000.0) * exponents)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(waves, (0, width - waves.shape[-1]))
