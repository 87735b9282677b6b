"""Features of media on disk: what was decoded and processed once is read back, in later epochs, runs and ranks."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veomni.data.multimodal.family import MediaFeatures
from veomni.data.multimodal.pixels import Normalization, PixelList, Pixels
from veomni.data.sources.cache import digest
from veomni.logging import create_logger

logger = create_logger(__name__)

_FORMAT = 3
_KEPT = 0.9  # of the size is left after files were removed, so that this is not done at every write
_WRITES_BETWEEN_SCANS = 64


class FeatureCache:
    """A directory of safetensors files, one per image, video or audio clip, named after content and processor settings.

    Any number of processes may share it. A file is written under another name and renamed, so none is ever seen half
    written; a damaged one is made again. The files not used for longest are removed when all exceed ``max_bytes``, for
    a moment only by what other processes have written since the last look. ``settings`` are what decides the features
    of a content, in a form that JSON can hold.
    """

    def __init__(self, directory: Path, max_bytes: int, settings: Any) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._settings = digest([_FORMAT, settings])
        self._size = self._writes = 0

    def path(self, kind: str, content: bytes) -> Path:
        """Return where the features of a content are kept."""
        hashed = hashlib.blake2b(f"{self._settings} {kind} ".encode(), digest_size=20)
        hashed.update(content)
        name = hashed.hexdigest()
        return self.directory / name[:2] / f"{name[2:]}.safetensors"

    def read(self, path: Path) -> MediaFeatures | None:
        """Return what is kept at a path, or None."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            # Read at once: safetensors opens files again for their tensors, and another process may have removed them.
            content = path.read_bytes()
            recorded = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            tensors = _with_pixels(load(content), json.loads(recorded["pixels"]))
            features = MediaFeatures(tensors, recorded["text"], recorded["source"])
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            logger.warning("%s is damaged (%s) and is made again", path, error)
            return None
        with suppress(OSError):  # removed meanwhile
            os.utime(path)
        return features

    def write(self, path: Path, features: MediaFeatures) -> None:
        """Keep features at a path."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        os.close(handle)
        try:
            tensors, pixels = _without_pixels(features.tensors)
            save_file(tensors, temporary, {"text": features.text, "source": features.source, "pixels": pixels})
            size = os.stat(temporary).st_size
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        self._size += size
        if self._writes % _WRITES_BETWEEN_SCANS == 0 or self._size > self.max_bytes:
            self._shrink()
        self._writes += 1

    def _shrink(self) -> None:
        """Look at all files, and remove the oldest until the rest is small enough."""
        found = []
        for path in self.directory.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # another process removes files, too
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        self._size = sum(size for _, size, _ in found)
        bound = self.max_bytes if self._size <= self.max_bytes else _KEPT * self.max_bytes
        for _, size, path in sorted(found):
            if self._size <= bound:
                break
            path.unlink(missing_ok=True)
            self._size -= size


def _without_pixels(features: Mapping[str, Tensor | PixelList]) -> tuple[dict[str, Tensor], str]:
    """Return what safetensors can hold, and what else 8-bit pixels are made of, as JSON."""
    tensors, recorded = {}, {}
    for name, value in features.items():
        if isinstance(value, PixelList):
            [pixels] = value  # of one image or video
            tensors[name] = torch.from_numpy(pixels.values)
            recorded[name] = {"shape": pixels.shape, **asdict(pixels.normalization)}
        else:
            tensors[name] = value.contiguous()
    return tensors, json.dumps(recorded)


def _with_pixels(tensors: Mapping[str, Tensor], recorded: Mapping[str, Any]) -> dict[str, Tensor | PixelList]:
    found: dict[str, Tensor | PixelList] = dict(tensors)
    for name, facts in recorded.items():
        normalization = Normalization(facts["scale"], tuple(facts["mean"]), tuple(facts["std"]))
        found[name] = PixelList([Pixels(tensors[name].numpy(), tuple(facts["shape"]), normalization)])
    return found
