"""What may leave the machine."""

from __future__ import annotations

import copy

import pytest

from veomni.loggers.redact import redact
from veomni.run_config import Config

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    "key",
    [
        "api_key", "apikey", "apiKey", "APIKey", "WANDB_API_KEY", "key", "aws_secret_access_key", "private-key",
        "api_key_1", "token", "hf_token", "HF_TOKEN", "accessToken", "authtoken", "use_auth_token", "tokens",
        "password", "db.password", "PASSWD", "client_secret", "secrets", "credentials", "Authorization", "auth",
        "cookie", "bearer", "github_pat", "secret_id", "password_file",
    ],
)  # fmt: skip
def test_secrets_by_key(key) -> None:
    assert redact({key: SECRET}) == {key: "***"}
    assert redact({"a": [{"b": {key: SECRET}}]}) == {"a": [{"b": {key: "***"}}]}
    assert SECRET not in str(redact({key: {"value": SECRET, "more": [SECRET]}}))


@pytest.mark.parametrize(
    "key",
    [
        "pad_token", "eos_token", "bos_token", "image_token", "text_key", "tokenizer_path", "max_seq_len", "keep_last",
        "num_key_value_heads", "tokens_per_second", "author", "monitor", "compat", "path", "name",
    ],
)  # fmt: skip
def test_other_keys_keep_their_values(key) -> None:
    assert redact({key: "<value>"}) == {key: "<value>"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pw@host/data", "https://***@host/data"),
        ("https://pw@host", "https://***@host"),
        ("s3://me:p@w@host:9000/bucket", "s3://***@host:9000/bucket"),
        ("mirrors: http://a:b@x/ http://c:d@y/", "mirrors: http://***@x/ http://***@y/"),
        ("https://host/d?X-Amz-Signature=abc&part=1", "https://host/d?X-Amz-Signature=***&part=1"),
        ("https://host/d?part=1&token=abc#x", "https://host/d?part=1&token=***#x"),
        ("https://host/me@here", "https://host/me@here"),
        ("someone@example.org", "someone@example.org"),
    ],
)
def test_urls_anywhere(url, shown) -> None:
    assert redact({"x": [url]}) == {"x": [shown]}


def test_the_original_is_not_changed_and_other_types_stay() -> None:
    config = {"api_key": SECRET, "n": 1, "x": None, "on": True, "empty_token": "", "list": ("a", 2.5)}
    before = copy.deepcopy(config)
    shown = redact(config)
    assert config == before
    assert shown == {"api_key": "***", "n": 1, "x": None, "on": True, "empty_token": "", "list": ["a", 2.5]}


def test_nothing_of_our_own_schema_is_taken_for_a_secret() -> None:
    def texts(section) -> dict:
        return {
            name: texts(field.annotation) if hasattr(field.annotation, "model_fields") else "value"
            for name, field in section.model_fields.items()
        }

    assert redact(texts(Config)) == texts(Config)
