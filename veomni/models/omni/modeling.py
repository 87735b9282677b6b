"""A model of encoders, whose features go to their placeholders, a language foundation, and decoders of its states.

Methods are named as in transformers' vision-language models: shared rows and absent media are then handled alike.
"""

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from veomni.errors import DataError, ModelError
from veomni.families.omni import DECODERS, ENCODERS
from veomni.models.build.plan import derive_plan
from veomni.models.omni.build import OmniConfig
from veomni.models.omni.encoders import Projector, feature_channels
from veomni.parallel.plan import ParallelPlan


@dataclass
class OmniOutput:
    """What a composed model returns: the sum of all losses, None without labels, and the foundation's logits.

    ``losses`` are by component: "text", then the decoders'; each the mean over its own tokens, for
    ``Launcher.backward``. The logits are ``[batch, seq, vocab]``.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    logits: Tensor | None


class OmniModel(PreTrainedModel):
    """Encoders, a foundation and decoders in one module."""

    config_class = OmniConfig
    base_model_prefix = "omni"
    main_input_name = "input_ids"
    loss_component = "foundation"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    foundation: Any

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.foundation = AutoModelForCausalLM.from_config(config.text_config)
        for kind, encoder in (("image", config.vision_config), ("audio", config.audio_config)):
            if encoder is not None:
                self.add_module(f"{kind}_encoder", AutoModel.from_config(encoder))
                self.add_module(f"{kind}_projector", Projector(feature_channels(encoder), hidden_size))
        self.decoders: Any = nn.ModuleDict(
            {name: DECODERS.get(name)(hidden_size, **values) for name, values in config.decoders.items()}
        )
        self._hidden: list[Tensor] = []
        self.foundation.base_model.register_forward_hook(self._keep_hidden)
        self.post_init()

    @property
    def component_names(self) -> list[str]:
        """The components, by their names as modules: each is saved, loaded and sharded separately."""
        names = [name for name, _ in self.named_children() if name != "decoders"]
        return [*names, *(f"decoders.{name}" for name in self.decoders)]

    def get_parallel_plan(self) -> ParallelPlan:
        """Return the plans of all components, each derived separately."""
        joined: dict[str, tuple[str, ...]] = {field.name: () for field in fields(ParallelPlan)}
        for name in self.component_names:
            plan = derive_plan(self.get_submodule(name))
            for key in joined:
                joined[key] += tuple(f"{name}.{inner}" for inner in getattr(plan, key))
        return ParallelPlan(**joined)

    def get_input_embeddings(self) -> Any:
        """Return the foundation's."""
        return self.foundation.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the foundation's."""
        return self.foundation.get_output_embeddings()

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Return the foundation without its head: the text part."""
        return self.foundation.base_model

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Any:
        """Return projected features in ``pooler_output``, ``[tokens, hidden]`` for each image."""
        return self._encoded("image", self.config.vision_config, pixel_values, image_grid_thw)

    def get_audio_features(self, input_features: Tensor, feature_attention_mask: Tensor | None = None) -> Any:
        """Return projected features in ``pooler_output``, ``[tokens, hidden]`` for each audio clip."""
        return self._encoded("audio", self.config.audio_config, input_features, feature_attention_mask)

    def _encoded(self, kind: str, config: Any, values: Tensor, sizes: Tensor | None) -> Any:
        encoder, projector = self.get_submodule(f"{kind}_encoder"), self.get_submodule(f"{kind}_projector")
        pieces = ENCODERS.get(config.model_type).encode(encoder, values, sizes)
        projected = projector(torch.cat(pieces)).split([len(piece) for piece in pieces])
        return SimpleNamespace(pooler_output=tuple(projected))

    def get_placeholder_mask(self, input_ids: Tensor, token: int, features: Tensor) -> Tensor:
        """Return where features go, bool ``[batch, seq, 1]``; as many as there are, or a ``DataError``."""
        places = input_ids == token
        if int(places.sum()) != len(features):
            problem = f"the batch has {int(places.sum())} placeholders (token {token}) for {len(features)} features"
            raise DataError(problem, "give each item as many placeholders as its encoder makes features")
        return places.unsqueeze(-1)

    def forward(
        self, input_ids: Tensor | None = None, position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, labels: Tensor | None = None, pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None, input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any,
    ) -> OmniOutput:  # fmt: skip
        """Return losses and logits.

        Tokens, positions and unshifted labels are ``[batch, seq]``; media and their sizes are what the encoders take,
        the mask and the cache what the foundation takes. ``kwargs`` hold the decoders' keys; the rest is the
        foundation's.
        """
        if input_ids is None:
            raise ModelError("a composed model got no input_ids", "give token ids; inputs_embeds is not supported")
        embeds = self.get_input_embeddings()(input_ids)
        if input_features is not None:
            clips = self.get_audio_features(input_features, feature_attention_mask)
            embeds = self._place(embeds, input_ids, self.config.audio_token_id, clips)
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, image_grid_thw)
            embeds = self._place(embeds, input_ids, self.config.image_token_id, images)
        own = {key: kwargs.pop(key) for decoder in self.decoders.values() for key in decoder.keys if key in kwargs}
        for decoder in self.decoders.values():
            embeds = decoder.place(embeds, own)
        output = self.foundation(
            inputs_embeds=embeds, position_ids=position_ids, attention_mask=attention_mask, labels=labels,
            past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
        hidden = self._hidden.pop()
        losses = {} if output.loss is None else {"text": output.loss}
        losses |= {name: decoder.loss(hidden, own) for name, decoder in self.decoders.items()}
        loss = torch.stack(list(losses.values())).sum() if losses else None
        return OmniOutput(loss, losses, output.logits)

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden[:] = [output[0]]

    def _place(self, embeds: Tensor, tokens: Tensor, token: int, encoded: Any) -> Tensor:
        features = torch.cat(encoded.pooler_output)
        return embeds.masked_scatter(self.get_placeholder_mask(tokens, token, features), features.to(embeds.dtype))
