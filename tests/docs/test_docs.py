"""The documentation does what it says: links resolve, names exist, configurations load, commands and code run."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs import commands
from tests.docs.pages import PAGES, ROOT, Block, anchors, blocks, inline_code, links
from veomni.config.keys import all_keys
from veomni.config.yaml_file import read_yaml
from veomni.data import Encoder, IndexedDataset, Order, Packing, RecordSchema, build_dataloader, build_dataset
from veomni.models import build_tokenizer
from veomni.run_config import Config, check_layout

TEXTS = [*PAGES.values(), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
SECTIONS = {"model", "data", "train"}
LANGUAGES = {"bash", "console", "python", "yaml", "jsonl", "json", "toml", "text", ""}


@functools.cache
def keys():
    return frozenset(all_keys(Config))


def name_of(path):
    return path.name


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_resolve(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(there), f"{path.name}: {link} has no such heading"


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_files_and_keys_that_are_mentioned_exist(path):
    for word in inline_code(path):
        if re.fullmatch(r"(model|data|train)(\.[a-z_]+)+", word) and word != "train.sh":
            assert word in keys(), f"{path.name}: {word}"
        if re.fullmatch(r"(veomni|strategies|accelerators|examples|configs|benchmarks|tests|docs)/[\w./-]+", word):
            assert (ROOT / word).exists(), f"{path.name}: {word}"


def test_the_table_of_keys_is_that_of_the_schema():
    # In a process of its own: other tests register formats and components of theirs.
    found = subprocess.run(
        [sys.executable, "-m", "tests.docs.key_table"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert PAGES["configuration_keys"].read_text() == found.stdout, "run python -m tests.docs.key_table"


def test_architecture_shows_the_layers_that_are_enforced():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert blocks(PAGES["architecture"])[0].text.splitlines() == [layer.replace("veomni.", "") for layer in layers]


def test_architecture_names_what_there_is():
    rows = re.findall(r"^\| (`[\w./]+`.*?) \|.*\| (.*) \|$", PAGES["architecture"].read_text(), re.MULTILINE)
    for paths, names in rows:
        places = [path.removesuffix(".py").strip("/").replace("/", ".") for path in re.findall(r"`(.+?)`", paths)]
        modules = [importlib.import_module(f"veomni.{place.removeprefix('veomni.')}") for place in places]
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(module, name) for module in modules), f"{paths}: {name}"
    assert len(rows) > 10


def test_architecture_links_every_page():
    assert {f"{name}.md" for name in PAGES} - {"architecture.md"} <= set(links(PAGES["architecture"]))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page, workspace):
    found = blocks(PAGES[page])
    assert {block.language for block in found} <= LANGUAGES
    for block in found:
        if block.file is not None:
            (workspace / block.file).write_text(block.text)
    for block in found:
        if block.language in ("yaml", "jsonl", "json", "toml"):
            _reads(block)
        if block.language == "console":
            for command in commands.commands(block.text):
                commands.check(command)
    _runs(found)


def _reads(block: Block) -> None:
    match block.language:
        case "yaml":
            _configures(block)
        case "jsonl":
            _is_data(block)
        case "json":
            json.loads(block.text)
        case "toml":
            tomllib.loads(block.text)


def _configures(block: Block) -> None:
    """Load a whole configuration, or the smallest one with the block's keys replaced."""
    path = _stored(block)
    values, _ = read_yaml(path)
    if values.keys() >= SECTIONS:
        config = Config.from_file(path)
    else:
        config = Config.from_file(ROOT / "configs/text/tiny.yaml", values)
    check_layout(config, block.options.get("ranks") or config.train.local_processes("cpu", 1))


def _stored(block: Block) -> str:
    name = block.file or "block.yaml"
    Path(name).write_text(block.text)
    return name


def _is_data(block: Block) -> None:
    assert block.file is not None, f"{block.place}: give the data a file name"
    told = dict(re.findall(r"(data_type|format)=(\w+)", block.info))
    kind = "conversation" if "messages" in json.loads(block.text.splitlines()[0]) else "plaintext"
    if "media/" in block.text:
        kind = "multimodal"
    options = {"data_type": kind, **told}
    dataset, _ = build_dataset(block.file, RecordSchema(**options))
    assert len(dataset) == len(block.text.splitlines())
    if kind != "multimodal":
        _becomes_rows(dataset, block)
    if options["data_type"] != "pretokenized":
        assert all(dataset.texts())


def _becomes_rows(dataset: IndexedDataset, block: Block) -> None:
    """Load every sample as a run would, indexed or streamed."""
    tokenizer = build_tokenizer("my-model")
    renders = dataset.schema.type.renders
    template = ("qwen3" if "call" in block.text else "chatml") if renders else None
    loader = build_dataloader(
        dataset,
        Encoder(tokenizer, template),
        packing=Packing(max_seq_len=4096),
        order=Order(epochs=1, stream_shards=1),
        cache_dir="cache",
    )
    documents = sum(len(micro.rows.document_lengths) for step in loader for micro in step)
    assert documents == len(dataset) * (2 if dataset.schema.data_type == "preference" else 1), block.place


def _runs(found: list[Block]) -> None:
    """Run the page's shell commands in order, then its Python; check what each is said to print."""
    of_shell = {block.place: _shell(block) for block in found if block.language == "bash"}
    python = [block for block in found if block.language == "python"]
    of_python = _python(python) if python else ""
    printed = ""
    for block in found:
        if block.language == "text":
            _printed(block, printed)
        elif block.language in ("bash", "python"):
            printed = of_shell.get(block.place, of_python)


def _shell(block: Block) -> str:
    printed = ""
    for command in commands.commands(block.text):
        code, output = commands.run(command)
        printed += output
        assert code == block.options.get("exit", 0), f"{block.place}: {command}\n{output}"
    return printed


def _python(found: list[Block]) -> str:
    """Run all Python of a page, in one namespace."""
    source = [(block.place, compile(block.text, block.place, "exec")) for block in found]

    def script() -> None:
        names = {"__name__": "documentation"}
        for _, code in source:
            exec(code, names)

    code, output = commands.forked(script, max(block.options.get("ranks", 1) for block in found))
    assert code == 0, output
    return output


def _printed(block: Block, printed: str) -> None:
    """Every line of the block is part of a printed line, in this order; ``...`` stands for anything."""
    lines = iter(printed.splitlines())
    for expected in filter(str.strip, block.text.splitlines()):
        pattern = re.escape(expected.strip()).replace(r"\.\.\.", ".*")
        assert any(re.search(pattern, line) for line in lines), f"{block.place}: {expected!r} is not in\n{printed}"
