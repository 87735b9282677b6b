"""What families make of images, against transformers' processors."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests.data.multimodal.families import IMAGES, SPECS, config_of, oracle, tokenizer_of, transform_for
from tests.data.multimodal.files import image_bytes, pixels
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.multimodal.processors import MediaSettings, build_family
from veomni.data.sources.records import Document
from veomni.errors import ConfigError, ModelError

WIDE, TALL = Image.fromarray(pixels(40, 70)), Image.fromarray(pixels(66, 30, seed=9))
ASKED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "some words"}]},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "in it"}]},
]


def with_images(messages, images):
    return Document({"messages": messages, "images": [image_bytes(image) for image in images]}, "train, line 3")


def expected_of(name, transform, **media):
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template(ASKED, chat_template=transform.chat_template, tokenize=False)
    processor = oracle(name, transform.family)
    return processor(text=[text], add_special_tokens=False, return_tensors="pt", **media)


@pytest.mark.parametrize("name", IMAGES)
def test_inputs_equal_those_of_transformers(name):
    transform = transform_for(name, image_min_pixels=None)
    sample = transform(with_images(ASKED, [WIDE, TALL]))
    expected = expected_of(name, transform, images=[WIDE, TALL])
    assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist()
    found = {key: value for key, value in sample.items() if key not in ("input_ids", "labels")}
    per_token = [key for key in found if key.endswith("token_type_ids")]
    assert set(found) == {key for key in expected if key not in ("input_ids", "attention_mask", "num_crops")} | set(
        per_token
    )
    for key, value in found.items():
        same = expected[key][0] if key in per_token else expected[key]
        assert torch.equal(value, torch.as_tensor(same)), key


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("size", [(70, 40), (30, 66), (16, 16), (200, 10), (333, 500)])
def test_the_size_of_an_image_says_its_text(name, size):
    family = transform_for(name).family
    image = Image.new("RGB", size)
    assert family.image_text(*size) == family.image(image).text


@pytest.mark.parametrize("changes", [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5},
                                     {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.7]}])  # fmt: skip
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v", "gemma3", "internvl"])
def test_settings_of_normalisation_are_followed(name, changes):
    transform = transform_for(name)
    vars(transform.family.image_processor).update(changes)
    sample = transform(with_images(ASKED, [WIDE, TALL]))
    expected = expected_of(name, transform, images=[WIDE, TALL])["pixel_values"]
    assert torch.equal(sample["pixel_values"], torch.as_tensor(expected).float())


def test_another_models_processor_is_rejected(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    with pytest.raises(ModelError, match="qwen2_vl models have a Qwen2VLImageProcessor, not CLIPImageProcessorPil"):
        build_family(config_of("qwen2_vl"), tokenizer_of("qwen2_vl"), tmp_path)


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_learned_are_the_answers(name):
    tokenizer = tokenizer_of(name)
    sample = transform_for(name)(with_images(ASKED, [WIDE, TALL]))
    supervised = sample["labels"] != -100
    assert torch.equal(sample["labels"][supervised], sample["input_ids"][supervised])
    recorded = tokenizer.decode(sample["labels"][supervised])
    for end in ("<|im_end|>", "<end_of_turn>", "<|endoftext|>"):
        recorded = recorded.replace(end, "")
    assert recorded.replace(" ", "") == "somewordsinit"


@pytest.mark.parametrize("name", IMAGES)
def test_marks_parts_and_columns_mean_the_same(name):
    image = image_bytes(WIDE)
    answer = {"role": "assistant", "content": "some words"}
    forms = [
        Document({"messages": [{"role": "user", "content": "<image>what?"}, answer], "images": [image]}, "a"),
        Document({"messages": [{"role": "user", "content": [
            {"type": "image", "image": {"bytes": image, "path": None}},
            {"type": "text", "text": "what?"}]}, answer]}, "b"),
        Document({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": _data_url(image)}, "text": None},
            {"type": "text", "text": "what?", "image_url": None}]}, answer], "images": None}, "c"),
        Document({"messages": [{"role": "user", "content": [
            {"type": "image", "image": WIDE}, {"type": "text", "text": "what?"}]}, answer]}, "d"),
    ]  # fmt: skip
    first, *others = map(transform_for(name), forms)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


def _data_url(content):
    import base64

    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.mark.parametrize("name", IMAGES)
def test_text_alone_has_no_features(name):
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "some words"}]
    sample = transform_for(name)(Document({"messages": messages}, "a"))
    assert {key for key in sample if not key.endswith("token_type_ids")} == {"input_ids", "labels"}


def test_images_in_an_answer_are_not_learned():
    messages = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": "some <image> words"}]
    sample = transform_for("qwen2_vl")(with_images(messages, [WIDE]))
    pad = tokenizer_of("qwen2_vl").convert_tokens_to_ids("<|image_pad|>")
    assert (sample["labels"][sample["input_ids"] == pad] == -100).all()
    assert (sample["input_ids"] == pad).sum() == sample["image_grid_thw"].prod() // 4


@pytest.mark.parametrize("name", IMAGES)
def test_answers_weigh_what_they_say(name):
    transform = transform_for(name)
    messages = [ASKED[0], {**ASKED[1], "weight": 0.25}, ASKED[2], {**ASKED[3], "weight": 3}]
    plain, sample = (transform(with_images(asked, [WIDE, TALL])) for asked in (ASKED, messages))
    weights = sample.pop("loss_weights")
    assert weights.dtype is torch.float32
    assert all(torch.equal(sample[key], plain[key]) for key in plain)
    supervised = sample["labels"] != -100
    first = supervised & (supervised.logical_not().cumsum(0) == supervised.logical_not().cumsum(0)[supervised][0])
    assert torch.equal(weights[supervised], torch.where(first, 0.25, 3.0)[supervised])
    length = len(weights)
    collate = MultimodalCollator(transform.family.config, max_seq_len=2 * length + 3)
    batch = collate([[plain, {**sample, "loss_weights": weights}], [plain]])
    assert torch.equal(batch["loss_weights"][0], torch.cat([torch.ones(length), weights, torch.ones(3)]))
    assert (batch["loss_weights"][1] == 1).all()
    assert "loss_weights" not in collate([[plain]])
    unsupervised = [ASKED[0], {**ASKED[1], "weight": 0}, *ASKED[2:]]
    assert "loss_weights" not in transform(with_images(unsupervised, [WIDE, TALL]))


@pytest.mark.parametrize("bound", [2_000, 8_000])
def test_pixels_of_images_are_bounded(bound):
    transform = transform_for("qwen2_5_vl", image_max_pixels=bound, image_min_pixels=100)
    sample = transform(with_images([{"role": "user", "content": "<image>"}, ASKED[1]], [TALL.resize((400, 900))]))
    assert 0.5 * bound < sample["image_grid_thw"].prod() * 16 <= bound


def test_long_images_are_cut_into_tiles():
    long = Image.fromarray(pixels(20, 60))
    transform = transform_for("internvl")
    sample = transform(with_images([{"role": "user", "content": "<image>"}, ASKED[1]], [long]))
    assert len(sample["pixel_values"]) > 1
    pad = tokenizer_of("internvl").convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (sample["input_ids"] == pad).sum() == 4 * len(sample["pixel_values"])


def test_crops_of_gemma_equal_transformers():
    transform = transform_for("gemma3")
    processor = transform.family.image_processor
    processor.do_pan_and_scan, processor.pan_and_scan_min_crop_size = True, 4
    processor.pan_and_scan_max_num_crops, processor.pan_and_scan_min_ratio_to_activate = 4, 1.2
    sample = transform(with_images(ASKED, [WIDE, TALL]))
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 4}
    expected = expected_of("gemma3", transform, images=[[WIDE, TALL]], **options)
    assert len(sample["pixel_values"]) > 2
    assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(sample["pixel_values"], expected["pixel_values"])


def test_files_of_a_model_are_followed(tmp_path):
    from transformers import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil(patch_size=8, merge_size=1, image_mean=[0.1, 0.2, 0.3], max_pixels=5_000).save_pretrained(
        tmp_path
    )
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": 7, "size": null, "patch_size": 8, "junk": 1}')
    family = build_family(config_of("qwen2_vl"), tokenizer_of("qwen2_vl"), tmp_path)
    made = family.image(WIDE)
    assert made.tensors["pixel_values"].shape[1] == 3 * 2 * 8 * 8
    assert made.text.count("<|image_pad|>") == made.tensors["image_grid_thw"].prod()
    assert (family.video_settings["fps"], family.video_settings["patch_size"]) == (7, 8)
    assert family.video_settings["size"]["longest_edge"] == 28 * 28 * 768


def test_one_file_may_hold_all_processors(tmp_path):
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 8},'
        ' "video_processor": {"fps": 3}, "feature_extractor": {"feature_size": 5}}'
    )
    family = build_family(config_of("qwen2_5_omni_thinker"), tokenizer_of("qwen2_5_omni_thinker"), tmp_path)
    assert family.image_processor.patch_size == 8
    assert family.video_settings["fps"] == 3
    assert family.feature_extractor.feature_size == 5


def test_without_a_file_for_videos_that_for_images_holds_as_in_transformers(tmp_path):
    """So it is in the directories of Qwen2.5-VL and of both omni models."""
    older = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 8, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    family = build_family(config_of("qwen2_5_vl"), tokenizer_of("qwen2_5_vl"), tmp_path)
    for made in (family.image_processor.size.__dict__, family.video_settings["size"]):
        assert (made["shortest_edge"], made["longest_edge"]) == (3136, 12_845_056)
    assert (family.video_settings["patch_size"], family.video_settings["image_mean"]) == (8, [0.1, 0.2, 0.3])
    assert family.frame_size(4, 64, 80) == (64, 80), "none is enlarged to the 128 tokens of other defaults"
    bounded = MediaSettings(video_max_pixels=50_000)
    family = build_family(config_of("qwen2_5_vl"), tokenizer_of("qwen2_5_vl"), tmp_path, bounded)
    assert family.video_settings["size"] == {"shortest_edge": 3136, "longest_edge": 50_000}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessor_config.json", "{", "cannot be read"),
        ("preprocessor_config.json", '{"image_processor_type": "AutoModel"}', "has no AutoModel"),
        ("preprocessor_config.json", '{"image_processor_type": "NoSuchImageProcessor"}', "has no NoSuchImageProcessor"),
        ("processor_config.json", "[1]", "cannot be read"),
    ],
)
def test_damaged_files_of_a_model_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        build_family(config_of("qwen2_vl"), tokenizer_of("qwen2_vl"), tmp_path)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llava", {"image_max_pixels": 100}), ("gemma3", {"video_fps": 1.0}), ("internvl", {"video_max_pixels": 9}),
     ("glm4v", {"video_min_frames": 2}), ("qwen2_audio", {"video_max_frames": 2})],
)  # fmt: skip
def test_settings_without_a_meaning_are_rejected(name, settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}.*: the processor of {name} models has no"):
        transform_for(name, **settings)


def test_unknown_models_and_foreign_tokenizers_are_rejected():
    from transformers import BertConfig

    with pytest.raises(ConfigError, match="no multimodal family is known for 'bert' models"):
        build_family(BertConfig(), tokenizer_of("qwen2_vl"))
    config = config_of("qwen2_vl")
    config.image_token_id = 10_000
    with pytest.raises(ModelError, match="no token for the model's image_token_id 10000"):
        build_family(config, tokenizer_of("qwen2_vl"))


def test_every_family_is_tested():
    from veomni.families.record import RECORDS

    assert set(SPECS) | {"glm4v_moe", "omni"} == {
        name for name, record in RECORDS.items() if record.media
    }  # composed models: test_omni_family.py


@pytest.mark.parametrize("name", SPECS)
def test_transforms_travel_to_workers(name):
    import pickle

    transform = transform_for(name)
    document = with_images(ASKED, [WIDE, TALL]) if name in IMAGES else Document({"messages": ASKED[2:]}, "a")
    expected = transform(document)
    found = pickle.loads(pickle.dumps(transform))(document)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
