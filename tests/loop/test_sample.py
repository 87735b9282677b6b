"""The sample at the end of a run: a held-out prompt, of a conversation through its chat template."""

from __future__ import annotations

import pytest

from tests.models.layouts import materialized
from tests.models.tiny import tiny_config
from veomni import build_tokenizer, show_sample
from veomni.data import build_dataset, cached_byte_bpe
from veomni.data.sources.schema import RecordSchema
from veomni.models import export_hf


@pytest.mark.parametrize(
    ("data_type", "path", "prompt"),
    [
        (
            "conversation",
            "number-words-test",
            "<|im_start|>user\nHow is {number} said?<|im_end|>\n<|im_start|>assistant",
        ),
        ("plaintext", "{texts}", "first = 4\nfirst = 5\n--- "),
    ],
)
def test_a_held_out_prompt_is_continued(tmp_path, capsys, data_type, path, prompt):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.py").write_text("".join(f"first = {number}\n" for number in range(12)))
    documents, _ = build_dataset([path.format(texts=texts)], RecordSchema(data_type), cache_dir=tmp_path)
    tokenizer = build_tokenizer(cached_byte_bpe(documents, 300, tmp_path))
    export_hf(materialized(tiny_config("llama", vocab_size=300)), tmp_path / "hf", tokenizer=tokenizer)
    show_sample(tmp_path / "hf", documents, chat_template="chatml" if data_type == "conversation" else None)
    printed = capsys.readouterr()
    messages = documents[len(documents) // 2].record.get("messages")
    asked = messages[0]["content"].split()[2] if messages else ""
    assert prompt.format(number=asked) in printed.out
    assert f"{tmp_path}/hf continues:" in printed.out
    assert "Loading" not in printed.err


def test_nothing_is_shown_of_a_stream(capsys, tmp_path):
    show_sample(tmp_path, None)
    assert capsys.readouterr().out == ""
