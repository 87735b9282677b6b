"""The one place that touches what transformers does not export: contract tests in ``tests/models/test_hf.py``.

Everything here works from transformers 5.17 to 5.23. Imports are inside functions: importing veomni does not import
transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a transformers model; does not import transformers to find out."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def attention_names() -> list[str]:
    """Return the attention implementations transformers knows, registered ones included."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]


def supports_sdpa(model_class: type[nn.Module]) -> bool:
    """Whether a transformers class says that PyTorch's scaled-dot-product attention computes it correctly."""
    return bool(getattr(model_class, "_supports_sdpa", False))


def caps_scores(config: PreTrainedConfig) -> bool:
    """Whether attention scores have a soft cap, as in Gemma 2.

    PyTorch's scaled-dot-product attention has none; transformers 5.17 leaves it out without a word.
    """
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def construct(model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """Construct a transformers model in float32 on the current default device."""
    return model_class._from_config(config, dtype=torch.float32, attn_implementation=attention)


def construct_again(model: nn.Module) -> PreTrainedModel:
    """Construct another transformers model of the same class and configuration, as :func:`construct` does."""
    return construct(type(model), deepcopy(model.config), attention_of(model))  # type: ignore[arg-type]


InitialiserEntry = tuple[str, nn.Module, nn.Module | None]


def initialisers(model: nn.Module) -> Iterator[InitialiserEntry]:
    """Yield (name, module, transformers model whose ``_init_weights`` is responsible for it), children first.

    The order and the owner are those of ``PreTrainedModel.initialize_weights``.
    """

    def walk(module: nn.Module, name: str, owner: nn.Module | None) -> Iterator[InitialiserEntry]:
        owner = module if is_pretrained(module) else owner
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name, owner)
        yield name, module, owner

    return walk(model, "", None)


def init_weights(owner: nn.Module, module: nn.Module) -> None:
    """Initialise one module's own parameters and buffers in place, as its model's class defines."""
    owner._init_weights(module)  # type: ignore[operator]


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return ``{tied parameter: the parameter it shares its storage with}``; empty for other modules."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def keeps_fp32(model: nn.Module, parameter: str) -> bool:
    """Whether a transformers model keeps the named parameter in float32 under bfloat16.

    ``_keep_in_fp32_modules`` does not count: transformers honours that one under float16 only.
    """
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(pattern.replace("*", ".*"), parameter) for pattern in patterns)


def layer_classes(model: nn.Module) -> set[str]:
    """Return the class names of the layers that a transformers model must not be split inside of."""
    return set(getattr(model, "_no_split_modules", None) or ())


def ignored_unexpected(model: nn.Module) -> list[str]:
    """Return the patterns of checkpoint names that ``from_pretrained`` drops without a word."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if getattr(getattr(model, "config", None), "model_type", "").endswith("_thinker"):  # 5.17 does not say so itself
        patterns += [r"^talker", r"^token2wav", r"^code2wav"]
    return [*patterns, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]


def ignored_missing(model: nn.Module) -> list[str]:
    """Return the patterns of parameters that a checkpoint of this model may lack."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def render_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], template: str, tools: Sequence[Any] | None = None,
    *, prompt: bool = False, blocks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
    """Render a conversation as ``apply_chat_template`` does, and say where the ``{% generation %}`` blocks are.

    Args:
        tokenizer: Its special tokens are the template's variables.
        messages: The conversation, without values that are None.
        template: Jinja source.
        tools: Descriptions of functions.
        prompt: End with the head of the assistant's next message.
        blocks: Find the blocks.

    Returns:
        The text, and first and last plus one character of every block, in order.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [list(messages)], tools=list(tools) if tools else None, chat_template=template,
        return_assistant_tokens_mask=blocks, add_generation_prompt=prompt, **tokenizer.special_tokens_map,
    )  # fmt: skip
    texts, found = rendered
    return texts[0], [(start, end) for start, end in found[0]] if blocks else []


def set_config_flag(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Set an attribute on a configuration and on its (decoding) text part, where they have it."""
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if hasattr(part, name):
            setattr(part, name, value)


# ---------------------------------------------------------------- weight names and layouts


@dataclass
class Conversion:
    """Checkpoint tensors that become parameters together.

    Attributes:
        key: The name that groups them: of the first parameter (loading) or first checkpoint tensor (saving).
        sources: For every source pattern, the names of its tensors, in order.
        converter: transformers' ``WeightConverter``, or None where only the name changes.
        renamings: Transforms of names that are still to be applied to what the converter makes.
    """

    key: str
    sources: dict[str, list[str]]
    converter: Any = None
    renamings: Sequence[Any] = ()

    @property
    def names(self) -> list[str]:
        """Names of all source tensors."""
        return [name for names in self.sources.values() for name in names]

    @property
    def stacks_rows(self) -> bool:
        """Whether row ``i`` of the result needs only the ``i``-th tensor of every source pattern."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        if self.converter is None or len(self.converter.target_patterns) != 1:
            return False
        first, *rest = self.converter.operations
        return (
            type(first) is MergeModulelist
            and first.dim == 0
            and all(
                (type(op) is Concatenate and op.dim > 0) or (type(op) is Transpose and op.dim0 > 0 and op.dim1 > 0)
                for op in rest
            )
        )

    def convert(self, model: nn.Module, tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return the results by name.

        Args:
            model: The transformers model; some operations read its configuration.
            tensors: The tensors of every source pattern, in the order of ``sources``.
        """
        if self.converter is None:
            return {self.key: next(iter(tensors.values()))[0]}
        converter = deepcopy(self.converter)
        for pattern, values in tensors.items():
            for name, value in zip(self.sources[pattern], values, strict=False):
                converter.add_tensor(self.key, name, pattern, value)
        results = converter.convert(self.key, model=model, config=model.config)
        return {
            _rename(name, self.renamings): value[0] if isinstance(value, list) else value
            for name, value in results.items()
        }


def loading_conversions(model: nn.Module, names: Sequence[str]) -> list[Conversion]:
    """Group a checkpoint's tensor names by the parameters they become, as ``from_pretrained`` does.

    The transforms that matched are remembered on the model, so that saving reverts exactly these.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings, converters = _split(transforms)
    state = model.state_dict()
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    groups: dict[str, Conversion] = {}
    for name in _natural(names):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        _add(groups, key, name, pattern, converters)
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]  # type: ignore[assignment]
    return list(groups.values())


def saving_conversions(model: nn.Module, names: Sequence[str]) -> list[Conversion]:
    """Group a model's parameter names by the checkpoint tensors they become, as ``save_pretrained`` does."""
    renamings, converters = _split(_reverse_transforms(model))
    groups: dict[str, Conversion] = {}
    for name in _natural(names):
        key, pattern = _first_match(name, converters)
        key = key if pattern is not None else _rename(name, renamings)
        _add(groups, key, name, pattern, converters)
    for group in groups.values():
        group.renamings = renamings if group.converter is not None else ()
    return list(groups.values())


def copy_conversions(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` be saved with the transforms that ``source``'s checkpoint was read with."""
    conversions = getattr(source, "_weight_conversions", None)
    if conversions is not None:
        target._weight_conversions = conversions


def _reverse_transforms(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:  # randomly initialised: what a hub checkpoint of this type looks like, legacy names apart
        transforms = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        transforms = [transform for transform in transforms if not isinstance(transform, PrefixChange)]
    return [transform.reverse_transform() for transform in transforms[::-1]]


def _split(transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    from transformers import WeightConverter

    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return [transform for transform in transforms if not isinstance(transform, WeightConverter)], converters


def _natural(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _first_match(name: str, converters: Sequence[Any]) -> tuple[str, str | None]:
    for converter in converters:
        key, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return key, pattern
    return name, None


def _rename(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _add(groups: dict[str, Conversion], key: str, name: str, pattern: str | None, converters: Sequence[Any]) -> None:
    if pattern is None:
        groups.setdefault(key, Conversion(key, {key: []})).sources[key].append(name)
        return
    converter = next(c for c in converters if pattern in c.source_patterns)
    group = groups.setdefault(key, Conversion(key, {}, converter))
    group.sources.setdefault(pattern, []).append(name)


def computes_loss_itself(model: nn.Module) -> bool:
    """Return whether a model takes the causal loss within its forward, and not by its ``loss_function``."""
    return type(model).__name__ == "Qwen2AudioForConditionalGeneration"


def supports_flash_attention(model: nn.Module) -> bool:
    """Return whether a model's attention works on packed rows without a mask."""
    return bool(getattr(model, "_supports_flash_attn", False))


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention a model runs with."""
    return str(model.config._attn_implementation)  # type: ignore[union-attr]


def has_experts(model: nn.Module) -> bool:
    """Return whether a model's experts go through transformers' experts interface."""
    return is_pretrained(model) and bool(model._can_set_experts_implementation())  # type: ignore[operator]


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Make an experts implementation known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def use_experts(model: nn.Module, name: str) -> None:
    """Make a model's experts run with the implementation called ``name``."""
    model.set_experts_implementation(name)  # type: ignore[operator]


def router_logits(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield (name, router, where in its output its logits are) of what a model records as ``router_logits``."""
    seen: set[int] = set()
    for prefix, owner in model.named_modules():
        if not is_pretrained(owner):
            continue
        for recorder in _recorders(owner, "router_logits"):
            for name, module in owner.named_modules(prefix=prefix):
                named = recorder.layer_name is None or recorder.layer_name in name
                if isinstance(module, recorder.target_class) and named and id(module) not in seen:
                    seen.add(id(module))
                    yield name, module, int(recorder.index)


def _recorders(model: nn.Module, output: str) -> list[Any]:
    found = (getattr(model, "_can_record_outputs", None) or {}).get(output, ())
    recorders = found if isinstance(found, list | tuple) else [found]
    return [recorder for recorder in recorders if getattr(recorder, "target_class", None) is not None]


def own_balance_loss(model: nn.Module) -> float | None:
    """Return the weight of the load-balancing loss that a transformers model would add to its own loss; None without.

    It is that of the configuration's ``router_aux_loss_coef`` while ``output_router_logits`` is set.
    """
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config()) if is_pretrained(model) else ():
        if getattr(part, "output_router_logits", False):
            return float(getattr(part, "router_aux_loss_coef", 0.0))
    return None


def balances_on_softmax(model: nn.Module) -> bool:
    """Whether transformers defines a load-balancing loss for a model; it is always one of the softmax of the logits."""
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def drop_own_balance_loss(model: nn.Module) -> None:
    """Keep a transformers model from adding a load-balancing loss of its own; its configuration stays as it is."""

    def never(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": False}

    model.register_forward_pre_hook(never, with_kwargs=True)


def mask_makers(names: Sequence[str]) -> dict[str, Any]:
    """Return the functions that make attention masks for the attentions called ``names``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in names}


def within_documents(mask_function: Any, documents: Tensor) -> Any:
    """Return a mask rule that also asks query and key to be of the same document of ``[batch, seq]`` indices."""
    from transformers.masking_utils import and_masks, packed_sequence_mask_function

    return and_masks(mask_function, packed_sequence_mask_function(documents))


def counted_from(mask_function: Any, positions: Tensor) -> Any:
    """Return a mask rule that counts the places of query and key as ``positions``, ``[batch, seq]``, says."""

    def counted(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_function(batch, head, positions[batch, query], positions[batch, key])

    return counted


def leave_packing_to(known: Callable[[], bool]) -> None:
    """Keep transformers from looking for packed documents in position ids while ``known()`` says that they are known.

    Its own search sees a part of a row only, where several ranks share one, and what it finds there is wrong.
    """
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    if hasattr(search, "_veomni_left"):
        return

    def search_unless_known(position_ids: Tensor) -> Tensor | None:
        return None if known() else search(position_ids)

    search_unless_known._veomni_left = True  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = search_unless_known


# ---------------------------------------------------------------- towers, positions of images and videos


def bidirectional_mask(config: PreTrainedConfig, seen: Tensor, dtype: torch.dtype) -> Any:
    """Return the mask that a tower's attention takes for padded items.

    Args:
        config: The tower's configuration.
        seen: Which places hold something, bool ``[items, places]``.
        dtype: In which the tower computes.
    """
    from transformers.masking_utils import create_bidirectional_mask

    stand_in = torch.zeros(*seen.shape, 1, dtype=dtype, device=seen.device)
    return create_bidirectional_mask(config=config, inputs_embeds=stand_in, attention_mask=seen.long())


def rope_rule(model_class: type[Any], config: PreTrainedConfig) -> Any:
    """Return an object with a model family's ``get_rope_index`` and nothing else of the model, or None without one.

    Args:
        model_class: The class that is trained; the method may belong to the body inside it.
        config: Its configuration.
    """
    from transformers import MODEL_MAPPING

    body: Any = MODEL_MAPPING.get(type(config), None)
    owner: Any = next((cls for cls in (model_class, body) if hasattr(cls, "get_rope_index")), None)
    if owner is None:
        return None
    rule = owner.__new__(owner)
    nn.Module.__init__(rule)
    rule.config, rule.rope_deltas = config, None
    rule.spatial_merge_size = config.vision_config.spatial_merge_size
    return rule


def vision_geometry(vision: Any, grid: Tensor) -> dict[str, Tensor]:
    """Return what a vision tower computes from sizes ``[images, 3]`` alone, by the names it takes them under."""
    from transformers import vision_utils

    made = {
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        "position_ids": vision_utils.get_vision_position_ids(grid, vision.spatial_merge_size),
    }
    if hasattr(vision, "fullatt_block_indexes"):
        index, borders = vision_utils.get_vision_window_index(
            grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        made |= {"window_index": index, "cu_window_seqlens": borders}
    return made
