"""How tensors of a checkpoint become parameters, and back."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veomni.models.transformers_api.capabilities import is_pretrained


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
        inside = [
            (type(op) is Concatenate and op.dim > 0) or (type(op) is Transpose and op.dim0 > 0 and op.dim1 > 0)
            for op in rest
        ]
        return type(first) is MergeModulelist and first.dim == 0 and all(inside)

    def convert(self, model: nn.Module, tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return the results by name, of the tensors of every source pattern in the order of ``sources``."""
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

    The transforms that matched are kept on the model, so that saving reverts exactly these.
    """
    if not is_pretrained(model):
        return [Conversion(name, {name: [name]}) for name in names]
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
    renamings, converters = _split(_reverse_transforms(model) if is_pretrained(model) else [])
    groups: dict[str, Conversion] = {}
    for name in _natural(names):
        matches = (converter.rename_source_key(name) for converter in converters)
        key, pattern = next((found for found in matches if found[1] is not None), (_rename(name, renamings), None))
        _add(groups, key, name, pattern, converters)
    for group in groups.values():
        group.renamings = renamings if group.converter is not None else ()
    return list(groups.values())


def copy_conversions(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` be saved with the transforms that ``source``'s checkpoint was read with."""
    conversions = getattr(source, "_weight_conversions", None)
    if conversions is not None:
        target._weight_conversions = conversions


def ignored_unexpected(model: nn.Module) -> list[str]:
    """Return the patterns of checkpoint names that ``from_pretrained`` drops silently."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if getattr(getattr(model, "config", None), "model_type", "").endswith("_thinker"):  # 5.17 does not declare it
        patterns += [r"^talker", r"^token2wav", r"^code2wav"]
    return [*patterns, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]


def ignored_missing(model: nn.Module) -> list[str]:
    """Return the patterns of parameters that a checkpoint of this model may lack."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


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


def _rename(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _add(groups: dict[str, Conversion], key: str, name: str, pattern: str | None, converters: Sequence[Any]) -> None:
    converter = next((each for each in converters if pattern in each.source_patterns), None)
    group = groups.setdefault(key, Conversion(key, {}, converter))
    group.sources.setdefault(pattern or key, []).append(name)
