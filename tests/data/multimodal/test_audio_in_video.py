"""Videos that are heard as well: tokens, features, positions, logits and gradients are those of transformers.

The truth is transformers' own processor and model, told ``use_audio_in_video``, with each document by itself.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from PIL import Image

from tests.data.multimodal.families import SPECS, oracle, tokenizer_of, transform_for
from tests.data.multimodal.files import image_bytes, moving, pixels, sound_bytes, tone, video_bytes
from tests.data.multimodal.test_into_models import tiny
from tests.data.multimodal.test_videos import VideoProcessor
from tests.models.multimodal import gradients, worst
from tests.models.test_packed_multimodal import weigh
from veomni.data import CHAT_TEMPLATES
from veomni.data.multimodal import MediaSettings, MultimodalTransform, build_family
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.sources.records import Document
from veomni.families.mrope import FRACTION_PARTS, FRACTIONS, DocumentPositions
from veomni.models import Materializer, build_model
from veomni.models.adapter.passes.media import prepare_towers
from veomni.strategies.transforms.float64 import Float64Throughout

OMNI = ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"]
ANSWER = {"role": "assistant", "content": "some words"}
FRAMES = moving(24, 32, 40)
WAVE = tone(300, 0.4, 16_000)[:, 0] / 2


def audio(seconds):
    return video_bytes(FRAMES, clip=tone(440, seconds, 16_000)[:, 0] / 2)


def record(content, **media):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **media}


PICTURE = image_bytes(Image.fromarray(pixels(30, 40)))
SOUND = sound_bytes(WAVE[:, None])
RECORDS = {
    "heard": record("<video>what?", videos=[audio(2.7)]),
    "a short audio clip": record("a<video>", videos=[audio(0.5)]),
    "an audio clip longer than the images": record("<video>", videos=[audio(3.5)]),
    "with a image and another audio clip": record(
        "<image>a<video>b<audio>", images=[PICTURE], videos=[audio(2.7)], audios=[SOUND]
    ),
    "after another audio clip": record("<audio>a<video>", videos=[audio(1.3)], audios=[SOUND]),
    "two": record("<video>and<video>", videos=[audio(1.0), audio(2.1)]),
    "silent": record("<video>a<image>", videos=[video_bytes(FRAMES)], images=[PICTURE]),
    "words": record("what?"),
}
MIXED = {
    "silent first": record("a<video>b<video>c", videos=[video_bytes(FRAMES), audio(1.3)]),
    "silent last": record("<image><video>b<video>", videos=[audio(1.3), video_bytes(FRAMES)], images=[PICTURE]),
    "with others": record(
        "<video><audio><image><video><image>b<video><audio>", images=[PICTURE] * 2, audios=[SOUND] * 2,
        videos=[video_bytes(FRAMES), audio(2.0), video_bytes(FRAMES)],
    ),
}  # fmt: skip
"""Videos with and without audio clip in one document, for which transformers' rule has no answer."""


def transform_of(name, config, fps=3.0):
    """At three frames a second, positions of Qwen3-Omni are no whole numbers."""
    settings = MediaSettings(
        image_min_pixels=64, image_max_pixels=1200, video_max_pixels=4000, video_fps=fps, use_audio_in_video=True
    )
    family = build_family(config, tokenizer_of(name), None, settings)
    return MultimodalTransform(family, tokenizer_of(name), CHAT_TEMPLATES.get(SPECS[name]["template"]))


def sounds_in(config, ids):
    starts = (ids == config.vision_start_token_id).nonzero().flatten()
    return bool((ids[starts + 1] == config.audio_start_token_id).any())


def expected_positions(rule, config, sample):
    names = inspect.signature(rule.get_rope_index).parameters
    given = {key: sample[key] for key in names if key in sample}
    ids = sample["input_ids"]
    given |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    mask = sample.get("feature_attention_mask")
    axes, _ = rule.get_rope_index(
        **given, use_audio_in_video=sounds_in(config, ids), second_per_grids=sample.get("video_second_per_grid"),
        audio_seqlens=None if mask is None else mask.sum(-1),
    )  # fmt: skip
    return axes[:, 0].float()


def found_positions(config, sample):
    made = DocumentPositions(config)(sample)
    assert torch.equal(made["position_ids"][0], torch.arange(len(sample["input_ids"])))
    return made["position_ids"][1:] + made.get(FRACTIONS, torch.zeros(1, 3)).T / FRACTION_PARTS


def rule_of(config):
    model = build_model(config, weights="random")
    return next(module for module in model.modules() if hasattr(module, "get_rope_index"))


@pytest.mark.parametrize("fps", [2.0, 3.0])
@pytest.mark.parametrize("seconds", [0.5, 2.7, 3.5])
@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("name", OMNI)
def test_inputs_are_those_of_transformers(name, also, seconds, fps):
    transform = transform_for(name, use_audio_in_video=True, video_fps=fps)
    asked = [{"type": "audio"}] * also + [{"type": "video"}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": asked},
             {"role": "assistant", "content": [{"type": "text", "text": "some words"}]}]  # fmt: skip
    media = {"videos": [audio(seconds)], **({"audios": [SOUND]} if also else {})}
    sample = transform(Document({"messages": turns, **media}, "a"))
    waves = [WAVE] * also + [tone(440, seconds, 16_000)[:, 0] / 2]
    processor = oracle(name, transform.family, VideoProcessor(sample, transform.family))
    text = tokenizer_of(name).apply_chat_template(turns, chat_template=transform.chat_template, tokenize=False)
    indices = transform.family.sample_frames(24, 8.0)
    options = {"use_audio_in_video": True}
    if hasattr(processor, "replace_video_with_audio_token"):  # from 5.20 on an audio clip is said to be of a video
        options = {"load_audio_from_video": True, "audio_from_video_indices": [None] * also + [0]}
    expected = processor(
        text=[text], videos=[FRAMES], audio=waves, fps=len(indices) / 24 * 8, add_special_tokens=False,
        return_tensors="pt", **options,
    )  # fmt: skip
    assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist()
    assert sample["video_second_per_grid"].tolist() == pytest.approx(
        torch.as_tensor(expected["video_second_per_grid"]).tolist()
    )
    assert torch.equal(sample["video_grid_thw"], expected["video_grid_thw"])
    lengths = expected["feature_attention_mask"].sum(-1)
    assert sample["feature_attention_mask"].sum(-1).tolist() == lengths.tolist()
    for found, truth, length in zip(sample["input_features"], expected["input_features"], lengths, strict=True):
        # Of several audio clips transformers computes the last frames over the silence that fills up to the longest.
        inner = length - 2 if also and name == "qwen3_omni_moe_thinker" else length
        assert torch.allclose(found[:, :inner], truth[:, :inner], atol=2e-3)  # 16 bits in the file


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("name", OMNI)
def test_positions_are_those_of_transformers(name, case):
    config = tiny(name)
    sample = transform_of(name, config)(Document(RECORDS[case], "a"))
    assert sounds_in(config, sample["input_ids"]) == (case not in ("silent", "words"))
    expected = expected_positions(rule_of(config), config, sample)
    assert torch.equal(found_positions(config, sample), expected)
    fractional = bool((expected % 1).any())
    assert fractional == (name == "qwen3_omni_moe_thinker" and case != "words")


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("name", OMNI)
def test_where_some_videos_are_heard_each_is_placed_as_by_itself(name, case):
    config = tiny(name)
    sample = transform_of(name, config)(Document(MIXED[case], "a"))
    rule, ids = rule_of(config), sample["input_ids"]
    ends = (ids == config.vision_end_token_id).nonzero().flatten() + 1
    pieces, done, at = [], {"image": 0, "video": 0, "audio": 0}, 0
    for end in [*ends.tolist(), len(ids)]:
        piece = ids[at:end]
        counts = {kind: int((piece == getattr(config, f"{kind}_token_id")).any()) for kind in ("image", "video")}
        counts["audio"] = int((piece == config.audio_start_token_id).sum())
        own = {"input_ids": piece}
        for kind, keys in (("image", ["image_grid_thw"]), ("video", ["video_grid_thw", "video_second_per_grid"]),
                           ("audio", ["feature_attention_mask"])):  # fmt: skip
            if counts[kind]:
                own |= {key: sample[key][done[kind] : done[kind] + counts[kind]] for key in keys}
            done[kind] += counts[kind]
        pieces.append(expected_positions(rule, config, own) + (pieces[-1].max() + 1 if pieces else 0))
        at = end
    assert done == {kind: len(MIXED[case].get(f"{kind}s", [])) + (kind == "audio") for kind in done}
    assert torch.equal(found_positions(config, sample), torch.cat(pieces, dim=1))


@pytest.mark.parametrize("name", OMNI)
def test_packed_equals_unpacked(name):
    config = tiny(name)
    transform = transform_of(name, config)
    chosen = ["heard", "a short audio clip", "after another audio clip", "silent", "words"]
    samples = [transform(Document(RECORDS[case], "a")) for case in chosen]
    for sample in samples:
        sample.update({k: v.double() for k, v in sample.items() if k.startswith(("pixel_values", "input_features"))})
    model = build_model(config, attention="sdpa", weights="random")
    Materializer(model, device=torch.device("cpu"), seed=0)(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.double() + 0.15 * noise
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")

    expected = []
    for number, sample in enumerate(samples):
        ids = sample["input_ids"]
        inputs = {**sample, "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        del inputs["labels"]
        with Float64Throughout():
            logits = model(**inputs, use_audio_in_video=sounds_in(config, ids)).logits[0]
            weigh(logits, number).backward()
        expected.append(logits.detach())
    truth = gradients(model)

    prepare_towers(model)
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch = MultimodalCollator(config, max_seq_len=sum(lengths) + 5)([samples])
    assert (FRACTIONS in batch) == (name == "qwen3_omni_moe_thinker")
    assert all(not value.is_floating_point() for key, value in batch.fields().items() if key.startswith("position_"))
    inputs = {key: value for key, value in batch.inputs.items() if key != "labels"}
    with Float64Throughout():
        found = model(**inputs).logits[0].split([*lengths, 5])[:-1]
        sum(weigh(piece, number) for number, piece in enumerate(found)).backward()
    for piece, whole in zip(found, expected, strict=True):
        assert (piece - whole).abs().max() <= 1e-12 * whole.abs().max()
    assert worst(gradients(model), truth) <= 1e-12
