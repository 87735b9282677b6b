"""Chat templates by name: the files of ``templates/``, each marking what the assistant says with ``{% generation %}``.

They follow the published prompt formats of the models they are named after. The end-of-turn token is inside the marks,
so that a model learns to stop.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from veomni.errors import ConfigError, DataError
from veomni.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATES: Registry[str] = Registry("chat template")
"""Name to Jinja source, as ``tokenizer.chat_template`` holds it."""

_HELPFUL = "You are a helpful assistant."
_VIRTUAL_HUMAN = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
_PADS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
_CHATML_WITH_MEDIA: dict[str, tuple[str, dict[str, str]]] = {  # what is said first, and what stands for media
    "qwen-vl": (_HELPFUL, _PADS),
    "qwen3-vl": ("", _PADS),
    "qwen2-audio": (_HELPFUL, {"audio": "Audio NUMBER: <|audio_bos|><|AUDIO|><|audio_eos|>\n"}),
    "qwen-omni": (
        _VIRTUAL_HUMAN,
        {
            "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
            "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
            "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
        },
    ),
    "qwen3-omni": ("", {**_PADS, "audio": "<|audio_start|><|audio_pad|><|audio_end|>"}),
    "omni": (
        "",
        {
            **_PADS,
            "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
            "codes": "<|vision_start|><|code_pad|><|vision_end|>",
            "latents": "<|vision_start|><|latent_pad|><|vision_end|>",
        },
    ),
    "internvl": ("", {"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}),
}


def _register_all() -> None:
    sources = {
        file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8").removesuffix("\n")
        for file in sorted(files("veomni.data").joinpath("templates").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".jinja")
    }
    body = sources.pop("_chatml_media")
    for name, (system, media) in _CHATML_WITH_MEDIA.items():
        sources[name] = f"{{%- set system = {json.dumps(system)} %}}\n{{%- set media = {json.dumps(media)} %}}\n{body}"
    for name, source in sources.items():
        CHAT_TEMPLATES.register(name)(source)


_register_all()


def find_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template's Jinja source.

    Args:
        name: A registered name, the path of a Jinja file, or None for the tokenizer's own template.
        tokenizer: Asked when ``name`` is None.

    Raises:
        DataError: the tokenizer has no template of its own.
        ConfigError: ``name`` is neither registered nor a file.
    """
    if name is None:
        if not tokenizer.chat_template:
            known = ", ".join(CHAT_TEMPLATES)
            raise DataError(
                "the tokenizer has no chat template", f"set chat_template to one of: {known}", "Encoder.chat_template"
            )
        return tokenizer.get_chat_template()
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES.get(name)
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    fix = did_you_mean(name, list(CHAT_TEMPLATES))
    raise ConfigError(f"chat_template: {name!r} is neither a known template nor a file", fix, "Encoder.chat_template")
