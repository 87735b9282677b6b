"""Models: registries, building on the meta device, plans, weights in and out."""

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
from veomni.models.traits.packs_documents import try_packing
from veomni.models.weights.export import export_hf, export_tensors_hf
from veomni.models.weights.gather import unwrap
from veomni.models.weights.materialize import Materializer
from veomni.models.weights.source import WeightSource

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
    "export_tensors_hf",
    "freeze",
    "install_token_loss",
    "isolate_documents",
    "prepare_towers",
    "resolve_attention",
    "resolve_experts",
    "try_packing",
    "unwrap",
]
