"""The section ``data.media``: images, videos and audio of conversations."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from typing_extensions import override

from veomni.config.problems import Problem
from veomni.config.section import options_of
from veomni.data.loading.encoder import Encoder
from veomni.data.multimodal.feature_cache import FeatureCache
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.processors import MediaSettings, build_family, settings_of
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.samples import SkipBadMedia
from veomni.data.multimodal.transform import MultimodalTransform
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.fetch import Fetch
from veomni.data.sources.formats import MESSAGES
from veomni.data.text.chat_templates import find_chat_template

_OPTIONS: Any = options_of(
    MediaReader, MediaLimits, MediaSettings, SkipBadMedia, Fetch, supplied=("hosts",),
    renames={"Fetch.hosts": "url_hosts", "Fetch.timeout": "url_timeout"},
)  # fmt: skip


class MediaSection(_OPTIONS):
    """Where media are, how large they may be, and what the model sees; null keeps what the model's files say."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    url_hosts: list[str] = Field([])
    """Hosts that media are fetched from (.example.com allows all below it); empty allows no URLs."""
    on_bad_media: Literal["error", "skip"] = "error"
    """What happens to a record with media that cannot be used: skip leaves it out, with a line in the log."""
    cache_gib: float = Field(0.0, ge=0)
    """Size in GiB of the cache of decoded media below data.cache_dir; 0 keeps none."""

    @override
    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if changed and not config.data.has_media:
            yield Problem(
                f"data.media.{changed[0]} has no meaning with data.data_type {config.data.data_type.chosen}",
                "leave it out, or set data.data_type to multimodal",
            )

    def build_transform(self, config: Any, tokenizer: Any) -> MultimodalTransform:
        """Return what makes samples of conversations with media; see :func:`build_family` for its errors."""
        from veomni.models.build.config import find_directory

        limits = self.make(MediaLimits)
        given = (find_directory(path) for path in (config.model.tokenizer_path, config.model.model_path) if path)
        directory = next((path for path in given if path), None)
        family = build_family(config.model.build_config(), tokenizer, directory, self.make(MediaSettings))
        cache = None
        if self.cache_gib:
            place = cache_directory(config.data.cache_dir) / "media"
            cache = FeatureCache(place, int(self.cache_gib * (1 << 30)), [settings_of(family), asdict(limits)])
        template = find_chat_template(config.data.chat_template, tokenizer)
        reader = MediaReader(Path(self.root), self.make(Fetch) if self.url_hosts else None, limits)
        return MultimodalTransform(family, tokenizer, template, reader, MESSAGES, cache)

    def build_encoder(self, config: Any, tokenizer: Any) -> Encoder:
        """Return what turns conversations with media, and texts mixed with them, into tokens."""
        skip = self.make(SkipBadMedia) if self.on_bad_media == "skip" else None
        return Encoder(tokenizer, config.data.chat_template, self.build_transform(config, tokenizer), skip)
