"""Which classes a model type stands for: registered ones first, then everything transformers has.

Functions are registered that import and return a class, so that registering costs nothing: ``docs/models.md``.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from veomni.errors import ModelError
from veomni.registry import Registry, did_you_mean

MODEL_CONFIG_REGISTRY: Registry[Callable[[], type[Any]]] = Registry("model config", home="veomni.models.omni")
"""Model type -> function that returns its configuration class."""

MODELING_REGISTRY: Registry[Callable[[str | None], type[nn.Module]]] = Registry("model", home="veomni.models.omni")
"""Model type -> function that is given the architecture named in config.json and returns the module class."""

MODEL_PROCESSOR_REGISTRY: Registry[Callable[[], type[Any]]] = Registry("model processor")
"""Model type -> function that returns its processor class."""

_SEQ_TO_SEQ = ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING")
_DECODER = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING")


def config_class(model_type: str) -> type[Any]:
    """Return the configuration class of a model type, registered or transformers' own; a ModelError without one."""
    if model_type in MODEL_CONFIG_REGISTRY:
        return MODEL_CONFIG_REGISTRY.get(model_type)()
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        known = [*MODEL_CONFIG_REGISTRY, *CONFIG_MAPPING.keys()]
        fix = did_you_mean(model_type, known, otherwise="use a model type of transformers, or register your own")
        raise ModelError(f"no model type is called {model_type!r}", fix)
    return CONFIG_MAPPING[model_type]


def model_class(config: Any) -> type[nn.Module]:
    """Return the class to build for a configuration; a ModelError where there is none.

    The architecture that config.json names is built where transformers has it; otherwise the first head that fits:
    causal language model, multimodal language model, and last the bare body; for encoder-decoders, sequence to
    sequence before all others. A head for the text part alone does not fit a configuration that has more parts.
    """
    import transformers

    architecture = (getattr(config, "architectures", None) or [None])[0]
    if config.model_type in MODELING_REGISTRY:
        return MODELING_REGISTRY.get(config.model_type)(architecture)
    named = getattr(transformers, architecture, None) if architecture else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    heads = (*_SEQ_TO_SEQ, *_DECODER) if getattr(config, "is_encoder_decoder", False) else (*_DECODER, *_SEQ_TO_SEQ)
    for name in (*heads, "MODEL_MAPPING"):
        found = getattr(transformers, name).get(type(config), None)
        chosen: type[nn.Module] | None = found[0] if isinstance(found, tuple) else found
        if chosen is not None and getattr(chosen, "config_class", None) not in config.sub_configs.values():
            return chosen
    raise ModelError(f"no model class is known for type {config.model_type!r}", "register one in MODELING_REGISTRY")
