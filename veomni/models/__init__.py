"""Models: registries, building on the meta device, plans, weights in and out."""

from veomni.models.attention import resolve_attention
from veomni.models.build import build_model
from veomni.models.config import build_config
from veomni.models.experts import resolve_experts
from veomni.models.export import export_hf, export_tensors_hf
from veomni.models.freeze import freeze
from veomni.models.gather import unwrap
from veomni.models.loader import MODEL_CONFIG_REGISTRY, MODEL_PROCESSOR_REGISTRY, MODELING_REGISTRY
from veomni.models.loss_context import LossContext
from veomni.models.materialize import Materializer
from veomni.models.omni import build_omni_model
from veomni.models.packed_masks import isolate_documents
from veomni.models.packing_probe import try_packing
from veomni.models.plan import derive_plan
from veomni.models.source import WeightSource
from veomni.models.token_loss import TokenMeanLoss, install_token_loss
from veomni.models.tokenizer import build_processor, build_tokenizer
from veomni.models.towers import prepare_towers

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
