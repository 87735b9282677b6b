"""Models composed from encoders, a language foundation and decoders; registered under the model type ``omni``."""

from pkgutil import resolve_name

from veomni.models.loader import MODEL_CONFIG_REGISTRY, MODELING_REGISTRY

MODEL_CONFIG_REGISTRY.register("omni")(lambda: resolve_name("veomni.models.omni.build:OmniConfig"))
MODELING_REGISTRY.register("omni")(lambda architecture: resolve_name("veomni.models.omni.modeling:OmniModel"))
