"""Models: registries, building on the meta device, plans, weights in and out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veomni.models.adapter.passes.documents import isolate_documents as isolate_documents
    from veomni.models.adapter.passes.loss_context import LossContext as LossContext
    from veomni.models.adapter.passes.media import prepare_towers as prepare_towers
    from veomni.models.adapter.passes.token_loss import (
        TokenMeanLoss as TokenMeanLoss,
    )
    from veomni.models.adapter.passes.token_loss import (
        install_token_loss as install_token_loss,
    )
    from veomni.models.build.attention import resolve_attention as resolve_attention
    from veomni.models.build.config import build_config as build_config
    from veomni.models.build.experts import resolve_experts as resolve_experts
    from veomni.models.build.freeze import freeze as freeze
    from veomni.models.build.model import build_model as build_model
    from veomni.models.build.plan import derive_plan as derive_plan
    from veomni.models.build.tokenizer import build_processor as build_processor
    from veomni.models.build.tokenizer import build_tokenizer as build_tokenizer
    from veomni.models.loader import (
        MODEL_CONFIG_REGISTRY as MODEL_CONFIG_REGISTRY,
    )
    from veomni.models.loader import (
        MODEL_PROCESSOR_REGISTRY as MODEL_PROCESSOR_REGISTRY,
    )
    from veomni.models.loader import (
        MODELING_REGISTRY as MODELING_REGISTRY,
    )
    from veomni.models.omni import build_omni_model as build_omni_model
    from veomni.models.weights.export import (
        export_hf as export_hf,
    )
    from veomni.models.weights.export import (
        export_tensors as export_tensors,
    )
    from veomni.models.weights.materialize import Materializer as Materializer
    from veomni.models.weights.source import WeightSource as WeightSource
    from veomni.parallel.wrappers import unwrap as unwrap

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
    "freeze": "veomni.models.build.freeze",
    "install_token_loss": "veomni.models.adapter.passes.token_loss",
    "isolate_documents": "veomni.models.adapter.passes.documents",
    "prepare_towers": "veomni.models.adapter.passes.media",
    "resolve_attention": "veomni.models.build.attention",
    "resolve_experts": "veomni.models.build.experts",
    "unwrap": "veomni.parallel.wrappers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veomni.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
