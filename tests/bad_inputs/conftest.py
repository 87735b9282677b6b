from tests.data.conftest import tokenizer  # noqa: F401
