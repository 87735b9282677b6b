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
    return [*patterns, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]


def ignored_missing(model: nn.Module) -> list[str]:
    """Return the patterns of parameters that a checkpoint of this model may lack."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


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


def supports_flash_attention(model: nn.Module) -> bool:
    """Return whether a model's attention works on packed rows without a mask."""
    return bool(getattr(model, "_supports_flash_attn", False))


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention a model runs with."""
    return str(model.config._attn_implementation)  # type: ignore[union-attr]


def has_experts(model: nn.Module) -> bool:
    """Return whether a model's experts go through transformers' experts interface."""
    return is_pretrained(model) and bool(model._can_set_experts_implementation())  # type: ignore[operator]


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module holds all experts of a layer, and runs them through transformers' experts interface."""
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed"))


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Make an experts implementation known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def use_experts(model: nn.Module, name: str) -> None:
    """Make a model's experts run with the implementation called ``name``."""
    model.set_experts_implementation(name)  # type: ignore[operator]


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
