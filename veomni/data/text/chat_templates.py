"""Chat templates by name: the files of ``templates/``, each marking what the assistant says with ``{% generation %}``.

They follow the published prompt formats of the models they are named after. The end-of-turn token is inside the marks,
so that a model learns to stop.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from veomni.errors import ConfigError, DataError
from veomni.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATES: Registry[str] = Registry("chat template")
"""Name to Jinja source, as ``tokenizer.chat_template`` holds it."""


def _register_all() -> None:
    sources = {
        file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8").removesuffix("\n")
        for file in sorted(files("veomni.data").joinpath("templates").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".jinja")
    }
    body = sources.pop("_chatml_media")
    for name, source in sources.items():
        # A file that only sets the system prompt and what stands for media shares the body of ChatML.
        CHAT_TEMPLATES.register(name)(f"{source}\n{body}" if source.startswith("{%- set system") else source)


_register_all()


def find_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja source of a registered name, of the path of a file, or for None the tokenizer's own.

    A tokenizer without one is a DataError, a ``name`` that is neither a ConfigError.
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
