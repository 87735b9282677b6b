"""A sample of every kind of bad input to the example script: exit code 78, one error, nothing left behind.

From the command line to the exit code of the process; the fork of a warm interpreter spares its start.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs.content import file_bytes
from tests.bad_inputs.table import BadInput, load
from tests.examples.script import ROOT, SMALL
from tests.launch.conftest import clean_environment
from veomni.errors import EXIT_BAD_INPUT

SCRIPT = ROOT / "examples/train.py"
TINY = ROOT / "configs/text/tiny.yaml"
GOOD_LINE = {"text": "the quick brown fox jumps over the lazy dog and runs away from the small grey cat " * 3}


def options(place: Path, case: Mapping[str, Any], more: Mapping[str, Any]) -> list[str]:
    """Return the command line of a run of two steps: what the case sets comes last."""
    ranks = case.get("ranks", 1)
    values = {
        **SMALL, "data.train_path": place / "corpus", "data.cache_dir": place.parent / "cache", "train.max_steps": 2,
        "train.output_dir": place / "output", "train.devices": ranks,
        "train.data_parallel_mode": "single" if ranks == 1 else "fsdp2",
    } | more | case.get("set", {})  # fmt: skip
    file = {"": str(TINY), "nowhere.yaml": "nowhere.yaml"}.get(name := case.get("file", ""), str(place / name))
    written = {key: value if isinstance(value, str | Path) else json.dumps(value) for key, value in values.items()}
    return [file, *(f"--{key}={value}" for key, value in written.items())]


def replaced(place: Path, kind: str) -> dict[str, Any]:
    """Return the keys of a run of the model directory, or of one from the checkpoint of a step."""
    if kind == "model":
        return {"model.model_path": place / "model", "model.config_path": None, "model.config_overrides": {},
                "model.train_tokenizer_vocab_size": None}  # fmt: skip
    if kind.startswith("step "):
        folder = place / f"output/checkpoints/global_step_{kind.removeprefix('step ')}"
        return {"train.checkpoint.resume": folder, "train.max_steps": 3}
    return {}


def damage(place: Path, case: Mapping[str, Any]) -> None:
    """Replace, edit, cut or remove what the case names; of several files, the largest is cut or flipped."""
    if "corpus" in case:
        shutil.rmtree(place / "corpus")
        (place / "corpus").mkdir()
        if case["corpus"]:
            write_corpus(place / "corpus", **case["corpus"])
    if "write" in case:
        (place / "bad.yaml").write_text(case["write"])
    if "edit" in case:
        config = place / "model/config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **case["edit"]}))
    for path in place.glob(case["remove"]) if "remove" in case else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for change, what in (("cut", cut), ("flip", flip)):
        if change in case:
            path = max(place.glob(case[change]), key=lambda path: path.stat().st_size)
            path.write_bytes(what(path.read_bytes()))


def write_corpus(folder: Path, file: str, after: int = 0, lines: list[Any] | None = None, **content: Any) -> None:
    """Write the files of a corpus: five, so that some are held out, or one of lines."""
    if lines is not None:
        (folder / file).write_bytes(file_bytes([*[GOOD_LINE] * after, *lines]))
    else:
        for index in range(5):
            (folder / f"{index}{file}").write_bytes(file_bytes(**content))


def cut(content: bytes) -> bytes:
    return content[:-7]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def run_forked(arguments: list[str], environment: Mapping[str, str], output: Path) -> tuple[int, int]:
    """Run the script in a fork of this warm process; return its exit code and its process group."""
    pid = os.fork()
    if not pid:
        os.setsid()
        with contextlib.suppress(BaseException):
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(ROOT)
            sys.argv = [str(SCRIPT), *arguments]
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = open(descriptor, "w", buffering=1)  # noqa: SIM115
            code = 70
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
                output.with_suffix(".modules").write_text("\n".join(sys.modules))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            sys.stderr.flush()
            os._exit(code)
        os._exit(71)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), pid


def run_supervised(arguments: list[str], environment: Mapping[str, str], output: Path) -> tuple[int, int]:
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdout=file, stderr=subprocess.STDOUT, env=dict(environment), cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        return process.wait(120), process.pid


def files(folder: Path) -> dict[str, bytes]:
    """What is on disk, logs and locks (and their holders) aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".log") and path.name not in (".lock", ".holder")
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs that work, and what a run of two steps on them has left: checkpoints of steps 1 and 2."""
    place = tmp_path_factory.mktemp("good")
    (place / "corpus").mkdir()
    for index, path in enumerate(sorted((ROOT / "veomni").glob("*.py"))):
        (place / f"corpus/{index:02d}.txt").write_text(path.read_text())
    arguments = options(place, {}, {"train.checkpoint.save_steps": 1, "train.eval.every_steps": 2})
    code, _ = run_forked(arguments, clean_environment(), place / "printed")
    assert code == 0, (place / "printed").read_text()
    for name in (place / "printed.modules").read_text().split():  # what every fork would import again
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    split(place / "output/hf", place / "model")
    return place


def split(exported: Path, target: Path) -> None:
    """Save an exported model again as people find them on the hub, in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(target, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(exported).save_pretrained(target)


@pytest.mark.parametrize("case", load("script"), ids=lambda case: case.name)
def test_it_ends_with_78_and_leaves_nothing(good: Path, tmp_path: Path, case: BadInput) -> None:
    place, printed, given = tmp_path / "place", tmp_path / "printed", case.given
    shutil.copytree(good, place)
    kind = given.get("with", "")
    if not kind.startswith("step"):
        shutil.rmtree(place / "output")
    damage(place, given)
    before = files(place)
    environment = {**clean_environment(), "WANDB_API_KEY": "", "HF_HUB_OFFLINE": "1", **given.get("environment", {})}
    run = run_forked if given["ranks"] == 1 else run_supervised
    code, group = run(options(place, given, replaced(place, kind)), environment, printed)
    text = printed.read_text()
    assert code == EXIT_BAD_INPUT, text
    assert case.names(text), text
    assert case.fix in text
    assert "Traceback" not in text
    assert text.count("fix: ") == 1, "one error, not one of every rank"
    assert files(place) == before, "nothing but logs may be written"
    with pytest.raises(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_the_inputs_are_good_without_the_damage(good: Path, tmp_path: Path) -> None:
    """Without this, a case could be rejected for another reason than its own."""
    place = tmp_path / "place"
    shutil.copytree(good, place)
    for number, kind in enumerate(("model", "step 2")):
        printed = tmp_path / f"printed{number}"
        code, _ = run_forked(options(place, {}, replaced(place, kind)), clean_environment(), printed)
        assert code == 0, printed.read_text()
