"""What the runs of the example script share: a small corpus, and imports that forked ranks then need not repeat."""

from __future__ import annotations

import pytest

from tests.examples.script import ROOT


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import veomni.run_config  # noqa: F401

    folder = tmp_path_factory.mktemp("corpus")
    for index, path in enumerate(sorted((ROOT / "veomni").glob("*.py"))):
        (folder / f"{index:02d}.txt").write_text(path.read_text())
    return folder
