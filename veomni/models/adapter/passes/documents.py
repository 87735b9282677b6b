"""Keep packed documents apart in every mask that a transformers model builds.

transformers finds packed documents only where a model hands its position ids to the mask maker; GPT-OSS and others do
not, and would mix documents without a warning. Here the makers read the boundaries of the rows from the current call.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from veomni.batch.documents import find_boundaries
from veomni.batch.forward_call import Documents, ForwardCall, current_call
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import ModelError
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.models.traits.rows import PassesDocuments, carried_state
from veomni.models.transformers_api.attention import text_attention_of
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.models.transformers_api.masks import disable_packing_detection, reindex_mask, restrict_to_documents
from veomni.ops.attention.row_rules import MASK_RULE, document_numbers, register_mask_rule
from veomni.ops.attention.varlen import VARLEN

_MAKERS = ("sdpa", "eager", "flex_attention", MASK_RULE)
_wrapped: set[Callable[..., Any]] = set()
"""The registered mask makers that read the current call."""


def isolate_documents(model: nn.Module) -> None:
    """Make a transformers model keep the documents of packed rows apart, and reject packed rows where it cannot.

    Its call must name its arguments. Other modules are left alone; calling it again changes nothing.
    """
    adapter = ModelAdapter.of(model)
    if is_pretrained(adapter.model) and not any(isinstance(each, IsolateDocuments) for each in adapter.passes):
        _wrap_mask_makers()
        adapter.add(IsolateDocuments(adapter.model))


class IsolateDocuments(InputPass):
    """Finds the documents of the rows of a call; before an examination, layers say whether it may have any."""

    stage = Stage.DOCUMENTS

    def __init__(self, model: Any) -> None:
        parts = (getattr(model.config, name, None) for name in model.config.sub_configs)
        text = type(model.config.get_text_config())
        self.encoders = frozenset(type(part) for part in parts if part is not None) - {text}
        self.unexamined = carried_state(model)

    def before(self, call: ForwardCall) -> None:
        """Set the documents of the call; a ModelError where rows are packed and the model does not keep them apart.

        So it is where ranks share rows and no argument is a tensor of a micro-batch: that alone holds the layout.
        """
        if call.sequence is not None and call.micro is None:
            problem = f"{type(call.owner.model).__name__} shares rows with other ranks, and was called with copies"
            raise ModelError(problem, "call model(**micro.inputs); of a changed copy leave one of its tensors as it is")
        found = documents_of(call.kwargs)
        if found is None:
            return
        verdict = (call.owner.traits or {}).get(PassesDocuments, self.unexamined)
        if found.numbers is not None and not verdict.ok:
            raise ModelError(verdict.reason, PassesDocuments.fix)
        if found.longest and text_attention_of(call.owner.model) == VARLEN:
            call.kwargs |= {"cu_seq_lens_q": found.boundaries, "cu_seq_lens_k": found.boundaries}
            call.kwargs |= {"max_length_q": found.longest, "max_length_k": found.longest}
        call.documents = replace(found, encoders=self.encoders)


def documents_of(inputs: Mapping[str, Any]) -> Documents | None:
    """Return the documents of the rows in a model's arguments; None for padded rows and caches.

    ``position_ids`` are ``[batch, seq]``, or ``[axes, batch, seq]`` with text first; without them each row is one
    document. Those of a micro-batch were examined before they were moved, and are not read on the device.
    """
    if inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return None
    positions, boundaries = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
    if positions is None:
        return Documents(None)
    rows = positions[0] if positions.dim() == 3 else positions
    micro = MicroBatch.of_call(inputs)
    if micro is not None and micro.rows.shard.size > 1:
        length = rows.shape[1] * micro.rows.shard.size
        if boundaries is None:
            return Documents(None)
        numbers = document_numbers(boundaries, rows.shape[0], length)
        return Documents(numbers, boundaries, inputs.get("max_length_q") or length)
    longest = 0
    if boundaries is None:
        boundaries, longest = find_boundaries(positions)
    if boundaries is None:
        return Documents(None)
    return Documents((torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1).cumsum(-1), boundaries, longest)


def _wrap_mask_makers() -> None:
    from transformers import AttentionMaskInterface

    register_mask_rule()
    disable_packing_detection(lambda: (call := current_call()) is not None and call.documents is not None)
    registered = AttentionMaskInterface()
    for name in _MAKERS:
        if registered[name] not in _wrapped:
            wrapped = _restrict_to_documents(registered[name])
            _wrapped.add(wrapped)
            AttentionMaskInterface.register(name, wrapped)


def _restrict_to_documents(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of masks that adds the boundaries of documents to a model's own rule: causal, sliding, chunked."""

    def make_packed(*args: Any, **options: Any) -> Any:
        call = current_call()
        documents = None if call is None else call.documents
        if documents is None or options.get("q_length") != options.get("kv_length"):
            return make(*args, **options)
        numbers = documents.numbers_for(options.get("config"), options.get("batch_size"), options.get("q_length"))
        if numbers is None:
            return make(*args, **options)
        rule = options["mask_function"]
        if getattr(options.get("config"), "attention_chunk_size", None) is not None:
            rule = reindex_mask(rule, documents.positions)  # chunks are counted from the start of a document
        options["mask_function"] = restrict_to_documents(rule, numbers)
        options["allow_is_causal_skip"] = False
        return make(*args, **options)

    return make_packed
