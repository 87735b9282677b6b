"""Models: registries, building on the meta device, plans, weights in and out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veomni.models.build.config import build_config as build_config
    from veomni.models.build.freeze import freeze as freeze
    from veomni.models.build.model import build_model as build_model
    from veomni.models.build.plan import derive_plan as derive_plan
    from veomni.models.build.tokenizer import build_processor as build_processor
    from veomni.models.build.tokenizer import build_tokenizer as build_tokenizer
    from veomni.models.loader import MODEL_CONFIG_REGISTRY as MODEL_CONFIG_REGISTRY
    from veomni.models.loader import MODEL_PROCESSOR_REGISTRY as MODEL_PROCESSOR_REGISTRY
    from veomni.models.loader import MODELING_REGISTRY as MODELING_REGISTRY
    from veomni.models.omni.build import build_omni_model as build_omni_model
    from veomni.models.weights.export import export_hf as export_hf
    from veomni.models.weights.export import export_tensors as export_tensors
    from veomni.models.weights.materialize import Materializer as Materializer
    from veomni.parallel.wrappers import unwrap as unwrap

# Importing a name imports its module, and nothing before that: ``veomni.ops`` uses ``transformers_api`` alone.
_HOMES = {
    "Materializer": "veomni.models.weights.materialize",
    "build_config": "veomni.models.build.config",
    "build_model": "veomni.models.build.model",
    "build_omni_model": "veomni.models.omni.build",
    "derive_plan": "veomni.models.build.plan",
    "freeze": "veomni.models.build.freeze",
    "unwrap": "veomni.parallel.wrappers",
    **dict.fromkeys(("MODELING_REGISTRY", "MODEL_CONFIG_REGISTRY", "MODEL_PROCESSOR_REGISTRY"), "veomni.models.loader"),
    **dict.fromkeys(("build_processor", "build_tokenizer"), "veomni.models.build.tokenizer"),
    **dict.fromkeys(("export_hf", "export_tensors"), "veomni.models.weights.export"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veomni.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
