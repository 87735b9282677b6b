"""What composed models are made of: encoders and decoders, read by the side of models and by the side of data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from veomni.registry import Registry

Encode = Callable[[Any, Tensor, Tensor | None], list[Tensor]]
"""From the module, its values and sizes to the features ``[tokens, channels]`` of each item."""


@dataclass(frozen=True)
class Encoder:
    """How to encode with a module of transformers, and the class that makes its pixels, without "Pil" (None: audio)."""

    encode: Encode
    image_processor: str | None = None


class Decoder(nn.Module):
    """What a composed model generates besides text, token by token after the foundation.

    A decoder places its inputs at their tokens, and predicts from the foundation's hidden states what comes next. Its
    loss is a mean over its own tokens, where a field of the document is not negative (``Field.counts``).

    Attributes:
        keys: Keys of a batch that are its own; a document that has the first has something to generate.
    """

    keys: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def read(values: Any, **options: Any) -> dict[str, Tensor]:
        """Return the values of a record as tensors ``[tokens, ...]``; ValueError for what it does not generate."""
        raise NotImplementedError

    @staticmethod
    def document(sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the keys that follow from a document, ``[seq, ...]``: what comes next at each of its tokens."""
        raise NotImplementedError

    def place(self, embeds: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the foundation's inputs ``[batch, seq, hidden]`` with this decoder's in their places."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss over this decoder's tokens from hidden states ``[batch, seq, hidden]``; zero for none.

        ``batch`` holds those of the decoder's keys that the micro-batch has.
        """
        raise NotImplementedError


ENCODERS: Registry[Encoder] = Registry("encoder of a composed model", home="veomni.models.omni.encoders")
"""transformers' model type of an encoder to how it is used."""
DECODERS: Registry[type[Decoder]] = Registry("decoder of a composed model", home="veomni.models.omni.decoders")
"""Name of a decoder to its class; called with the foundation's hidden size and the configuration's values."""
