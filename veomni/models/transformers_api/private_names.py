"""The names of transformers that it does not export, by the module of this package that uses them; on 5.17 to 5.23."""

from veomni.compat.private_name import PrivateName

_CONFIG, _MODEL = "transformers.configuration_utils:PreTrainedConfig", "transformers.modeling_utils:PreTrainedModel"
_LOADING, _MAPPING = "transformers.core_model_loading", "transformers.conversion_mapping"
_CONVERTER, _MASKS = f"{_LOADING}:WeightConverter", "transformers.masking_utils"
_MOE, _VISION = "transformers.integrations.moe", "transformers.vision_utils"
_AUDIO = "transformers.models.qwen2_audio.modeling_qwen2_audio:Qwen2AudioEncoder"
_LLAMA = "transformers.models.llama.modeling_llama"
_IMPORT, _ATTRIBUTE, _REPORTED = "ImportError", "AttributeError", "they are reported"

PRIVATE = tuple(
    PrivateName(*fields)
    for fields in (
        # attention
        (f"{_CONFIG}._attn_implementation", "names the attention", _ATTRIBUTE),
        (f"{_CONFIG}._experts_implementation", "names the experts", _ATTRIBUTE),
        (f"{_LLAMA}:eager_attention_forward", "each modeling file has its own", "an error: choose sdpa"),
        # capabilities
        (f"{_MODEL}._supports_sdpa", "whether sdpa attention is exact", "eager attention"),
        (f"{_MODEL}._supports_flash_attn", "whether attention works without a mask", "no varlen attention"),
        (f"{_MODEL}._keep_in_fp32_modules_strict", "parameters that stay float32", "they become bfloat16"),
        (f"{_MODEL}._no_split_modules", "layers that are sharded as one", "repeated layers of a ModuleList"),
        # chat
        ("transformers.utils.chat_template_utils:render_jinja_template",
         "apply_chat_template does not return where generation blocks are", _IMPORT,
         ("conversations", "tools", "chat_template", "return_assistant_tokens_mask", "add_generation_prompt")),
        # construction
        (f"{_MODEL}._from_config", "builds with dtype and attention", _ATTRIBUTE, ("config", "kwargs")),
        (f"{_MODEL}._init_weights", "a class's own initial values", _ATTRIBUTE, ("module",)),
        (f"{_MODEL}.loss_function", "its setter keeps a loss in _loss_function", _ATTRIBUTE),
        # conversions; a model keeps the transforms of its checkpoint in _weight_conversions
        (f"{_MAPPING}:get_model_conversion_mapping", "transforms", _IMPORT, ("model", "add_legacy")),
        (f"{_LOADING}:rename_source_key", "the parameter that a checkpoint name becomes", _IMPORT,
         ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict")),
        (f"{_CONVERTER}.add_tensor", "collects tensors", _ATTRIBUTE, ("source_pattern",)),
        (f"{_CONVERTER}.convert", "converts", _ATTRIBUTE, ("layer_name", "model", "config")),
        (f"{_CONVERTER}.rename_source_key", "matches a name", _ATTRIBUTE, ("source_key",)),
        (f"{_CONVERTER}.reverse_transform", "the transform for saving", _ATTRIBUTE),
        (f"{_CONVERTER}.was_used", "whether a checkpoint needed it", _ATTRIBUTE),
        (f"{_LOADING}:MergeModulelist", "stacks experts", _IMPORT, ("dim",)),
        (f"{_LOADING}:Concatenate", "joins gate and up projections", _IMPORT, ("dim",)),
        (f"{_LOADING}:Transpose", "transposes matrices of experts", _IMPORT, ("dim0", "dim1")),
        (f"{_LOADING}:PrefixChange", "renamings of old checkpoints", _IMPORT),
        (f"{_MODEL}.base_model_prefix", "the prefix of checkpoint names", _ATTRIBUTE),
        (f"{_MODEL}._keys_to_ignore_on_load_unexpected", "tensors to ignore", _REPORTED),
        (f"{_MODEL}._keys_to_ignore_on_load_missing", "parameters that may be missing", _REPORTED),
        # encoders
        (f"{_VISION}:get_vision_cu_seqlens", "boundaries of frames", _ATTRIBUTE, ("grid_thw",)),
        (f"{_VISION}:get_vision_position_ids", "positions", _ATTRIBUTE, ("grid_thw", "spatial_merge_size")),
        (f"{_VISION}:get_vision_window_index", "windows", _ATTRIBUTE, ("grid_thw", "window_size")),
        (f"{_AUDIO}._get_feat_extract_output_lengths", "features of a clip", "no dummy", ("input_lengths",)),
        (f"{_MASKS}:create_bidirectional_mask", "padded items", _IMPORT, ("config", "attention_mask")),
        # experts
        (f"{_MOE}:ALL_EXPERTS_FUNCTIONS.register", "registers a backend", _IMPORT, ("key", "value")),
        (f"{_MODEL}._can_set_experts_implementation", "whether experts use the interface", _ATTRIBUTE),
        (f"{_MODEL}.set_experts_implementation", "chooses", _ATTRIBUTE, ("experts_implementation",)),
        (f"{_MODEL}._can_record_outputs", "which modules are routers", "those beside modules called experts"),
        (f"{_MOE}:_default_apply_gate", "gating, as _apply_gate of classes", _ATTRIBUTE, ("gate_up_out",)),
        # masks
        (f"{_MASKS}:and_masks", "joins two rules", _IMPORT, ("mask_functions",)),
        (f"{_MASKS}:packed_sequence_mask_function", "packed rows", _IMPORT, ("packed_sequence_mask",)),
        (f"{_MASKS}:causal_mask_function", "the plain causal rule", "ring attention evaluates every rule"),
        (f"{_MASKS}:find_packed_sequence_indices", "is replaced", _ATTRIBUTE, ("position_ids",)),
    )
)  # fmt: skip
