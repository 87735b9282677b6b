"""Models: registries, building on the meta device, plans, weights in and out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veomni.models.adapter.passes.documents import isolate_documents
    from veomni.models.adapter.passes.loss_context import LossContext
    from veomni.models.adapter.passes.media import prepare_towers
    from veomni.models.adapter.passes.token_loss import TokenMeanLoss, install_token_loss
    from veomni.models.build.attention import resolve_attention
    from veomni.models.build.config import build_config
    from veomni.models.build.experts import resolve_experts
    from veomni.models.build.freeze import freeze
    from veomni.models.build.model import build_model
    from veomni.models.build.plan import derive_plan
    from veomni.models.build.tokenizer import build_processor, build_tokenizer
    from veomni.models.loader import MODEL_CONFIG_REGISTRY, MODEL_PROCESSOR_REGISTRY, MODELING_REGISTRY
    from veomni.models.omni import build_omni_model
    from veomni.models.weights.export import export_hf, export_tensors, export_tensors_hf
    from veomni.models.weights.gather import unwrap
    from veomni.models.weights.materialize import Materializer
    from veomni.models.weights.source import WeightSource

# Importing a name imports its module, and nothing before that: ``veomni.ops`` uses ``transformers_api`` alone.
_HOMES = {
    "LossContext": "veomni.models.adapter.passes.loss_context",
    "MODELING_REGISTRY": "veomni.models.loader",
    "MODEL_CONFIG_REGISTRY": "veomni.models.loader",
    "MODEL_PROCESSOR_REGISTRY": "veomni.models.loader",
    "Materializer": "veomni.models.weights.materialize",
    "TokenMeanLoss": "veomni.models.adapter.passes.token_loss",
    "WeightSource": "veomni.models.weights.source",
    "build_config": "veomni.models.build.config",
    "build_model": "veomni.models.build.model",
    "build_omni_model": "veomni.models.omni",
    "build_processor": "veomni.models.build.tokenizer",
    "build_tokenizer": "veomni.models.build.tokenizer",
    "derive_plan": "veomni.models.build.plan",
    "export_hf": "veomni.models.weights.export",
    "export_tensors": "veomni.models.weights.export",
    "export_tensors_hf": "veomni.models.weights.export",
    "freeze": "veomni.models.build.freeze",
    "install_token_loss": "veomni.models.adapter.passes.token_loss",
    "isolate_documents": "veomni.models.adapter.passes.documents",
    "prepare_towers": "veomni.models.adapter.passes.media",
    "resolve_attention": "veomni.models.build.attention",
    "resolve_experts": "veomni.models.build.experts",
    "unwrap": "veomni.models.weights.gather",
}

__all__ = [
    "MODELING_REGISTRY",
    "MODEL_CONFIG_REGISTRY",
    "MODEL_PROCESSOR_REGISTRY",
    "LossContext",
    "Materializer",
    "TokenMeanLoss",
    "WeightSource",
    "build_config",
    "build_model",
    "build_omni_model",
    "build_processor",
    "build_tokenizer",
    "derive_plan",
    "export_hf",
    "export_tensors",
    "export_tensors_hf",
    "freeze",
    "install_token_loss",
    "isolate_documents",
    "prepare_towers",
    "resolve_attention",
    "resolve_experts",
    "unwrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veomni.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
