"""Bad input to the example script as people run it: exit code 78, the thing and the fix named, nothing left behind.

What each part of the library refuses is listed beside its own tests; here a sample of every kind goes through the real
script, from the command line to the exit code of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.examples.script import SMALL
from tests.launch.conftest import clean_environment

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train.py"
TINY = ROOT / "configs" / "text" / "tiny.yaml"
WORDS = "the quick brown fox jumps over the lazy dog and runs away from the small grey cat "


class Place(NamedTuple):
    """Where a case happens: copies of good inputs, for the case to damage."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def output(self) -> Path:
        """What a finished run has left: checkpoints of steps 1 and 2."""
        return self.folder / "output"

    @property
    def model(self) -> Path:
        """A Hugging Face directory with weights in several files, and a tokenizer."""
        return self.folder / "model"


Preparation = Callable[[Place], object]


class Case(NamedTuple):
    """One bad input.

    Attributes:
        named: What the message must contain.
        arguments: Overrides; ``{place}`` is the folder of the case.
        prepare: Damages the inputs.
        environment: Variables of the process.
        ranks: 1 runs in the process itself, more under the supervisor.
        fresh: Whether the output directory does not exist before.
    """

    named: str
    arguments: tuple[str, ...] = ()
    prepare: Preparation | None = None
    environment: Mapping[str, str] = {}
    ranks: int = 1
    fresh: bool = True


def config_file(text: str) -> Preparation:
    return lambda place: (place.folder / "bad.yaml").write_text(text)


def corpus_of(name: str, content: str | bytes) -> Preparation:
    def prepare(place: Place) -> None:
        shutil.rmtree(place.corpus)
        place.corpus.mkdir()
        for index in range(5):  # some of them are held out
            path = place.corpus / (name if name.endswith(".jsonl") else f"{index}{name}")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def damage_model(name: str, change: Callable[[Path], object]) -> Preparation:
    return lambda place: change(next(iter(sorted(place.model.glob(name)))))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit_json(**changes: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_checkpoint(step: int, pattern: str, change: Callable[[Path], object]) -> Preparation:
    def prepare(place: Place) -> None:
        folder = place.output / "checkpoints" / f"global_step_{step}"
        largest = max((path for path in folder.rglob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)
        change(largest)

    return prepare


def jsonl(*lines: str) -> str:
    good = json.dumps({"text": WORDS * 3})
    return "\n".join([*[good] * 20, *lines]) + "\n"


def chat(role: str) -> str:
    messages = [{"role": role, "content": WORDS}, {"role": "assistant", "content": WORDS}]
    return json.dumps({"messages": messages}) + "\n"


MODEL = ("--model.model_path={place}/model", "--model.config_path=null", "--model.config_overrides={{}}")
MODEL += ("--model.train_tokenizer_vocab_size=null",)
CONVERSATION = ("--data.data_type=conversation",)
STEP_1 = ("--train.checkpoint.resume={place}/output/checkpoints/global_step_1", "--train.max_steps=3")
STEP_2 = ("--train.checkpoint.resume={place}/output/checkpoints/global_step_2", "--train.max_steps=3")
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
HEADER = "model: {config_path: qwen3}\n"

SHARED = ("--train.data_parallel_mode=ddp",)

CASES: dict[str, Case] = {
    # --- the file and the command line
    "no configuration file": Case("nowhere.yaml", ("nowhere.yaml",)),
    "unknown key": Case("did you mean 'seed'", ("--train.sed=1",)),
    "wrong type": Case("train.max_steps", ("--train.max_steps=many",)),
    "key given twice": Case("seed", ("{place}/bad.yaml",), config_file(HEADER + "train:\n  seed: 1\n  seed: 2\n")),
    "broken YAML": Case("bad.yaml", ("{place}/bad.yaml",), config_file("model: [\n")),
    "a list for a file": Case("bad.yaml", ("{place}/bad.yaml",), config_file("- 1\n")),
    "a Python object in YAML": Case(
        "bad.yaml", ("{place}/bad.yaml",), config_file("model: !!python/object/apply:os.getcwd []\n")
    ),
    "an empty file": Case("bad.yaml", ("{place}/bad.yaml",), config_file("")),
    "value out of range": Case("train.optimizer.lr", ("--train.optimizer.lr=-1",)),
    "keys that contradict": Case("train.eval.every_steps", ("--data.eval_fraction=0", "--train.eval.every_steps=1")),
    # --- data
    "missing file": Case("gone.jsonl", ("--data.train_path=gone.jsonl",)),
    "empty dataset": Case("no document", (), corpus_of("a.jsonl", "\n")),
    "empty directory": Case("corpus", (), lambda place: (shutil.rmtree(place.corpus), place.corpus.mkdir())),
    "malformed JSON line": Case("a.jsonl, line 21: not JSON", (), corpus_of("a.jsonl", jsonl('{"text": '))),
    "malformed JSON line, two ranks": Case(
        "a.jsonl, line 21: not JSON", (), corpus_of("a.jsonl", jsonl('{"text": ')), ranks=2
    ),
    "missing field": Case("no field 'text'", (), corpus_of("a.jsonl", jsonl('{"body": "x"}'))),
    "not UTF-8": Case("not UTF-8", (), corpus_of("a.txt", b"ab\xe9")),
    "damaged Parquet": Case("a.parquet: cannot be read", (), corpus_of("a.parquet", b"PAR1 no")),
    "unknown role": Case(
        "unknown role 'bot'",
        CONVERSATION,
        corpus_of("a.jsonl", chat("bot") * 9),
    ),
    "plain text read as conversations": Case("no field 'messages'", CONVERSATION),
    "unknown chat template": Case(
        "chatmal", (*CONVERSATION, "--data.chat_template=chatmal"), corpus_of("a.jsonl", chat("user") * 9)
    ),
    "a chat template for plain text": Case("data.chat_template", ("--data.chat_template=chatml",)),
    "sample longer than a row": Case(
        "more than max_seq_len 64", ("--data.on_overflow=error",), corpus_of("a.txt", WORDS * 99)
    ),
    "sample longer than a row, two ranks": Case(
        "more than max_seq_len 64", ("--data.on_overflow=error",), corpus_of("a.txt", WORDS * 99), ranks=2
    ),
    "no vocabulary for all bytes": Case("train_tokenizer_vocab_size", ("--model.train_tokenizer_vocab_size=100",)),
    # --- the model
    "unknown architecture": Case("qwen33", ("--model.config_path=qwen33",)),
    "heads that ranks cannot share": Case(
        "use one of 1, 2, 4",
        (*SHARED, "--train.devices=3", "--train.global_batch_size=4", "--train.ulysses_parallel_size=3"),
    ),
    "rows shorter than the ranks that share them": Case(
        "data.max_seq_len 3 is too short for 4 ranks",
        (*SHARED, "--train.devices=4", "--train.ulysses_parallel_size=4", "--data.max_seq_len=3"),
    ),
    "ranks that are no multiple of those that share a row": Case(
        "start a multiple of 2 ranks", (*SHARED, "--train.devices=3", "--train.ulysses_parallel_size=2")
    ),
    "overlap without exchanges": Case("train.ulysses.overlap True has no meaning", ("--train.ulysses.overlap=true",)),
    "unknown override": Case("num_hiden_layers", ("--model.config_overrides={{num_hiden_layers: 2}}",)),
    "more tokens than embeddings": Case(
        "400", ("--model.config_overrides={{vocab_size: 400}}", "--model.train_tokenizer_vocab_size=512")
    ),
    "rows longer than positions": Case("data.max_seq_len", ("--data.max_seq_len=9999999",)),
    "a model directory that is gone": Case("model.model_path", MODEL, lambda place: shutil.rmtree(place.model)),
    "a model directory without config": Case("config.json", MODEL, damage_model("config.json", Path.unlink)),
    "a model directory with a missing shard": Case(
        "model-00002-of-", MODEL, damage_model("model-00002-of-*", Path.unlink)
    ),
    "a missing shard, two ranks": Case(
        "model-00002-of-", MODEL, damage_model("model-00002-of-*", Path.unlink), ranks=2
    ),
    "a shard cut short": Case("model-00001-of-", MODEL, damage_model("model-00001-of-*", truncate)),
    "a model directory without weights": Case(
        "model", MODEL, lambda place: [path.unlink() for path in place.model.glob("*safetensors*")]
    ),
    "a config of another shape": Case("shape", MODEL, damage_model("config.json", edit_json(intermediate_size=65))),
    "a config that is no JSON": Case("config.json", MODEL, damage_model("config.json", truncate)),
    "a model type nobody knows": Case("qwen99", MODEL, damage_model("config.json", edit_json(model_type="qwen99"))),
    "no tokenizer there": Case(
        "tokenizer", MODEL, lambda place: [path.unlink() for path in place.model.glob("*token*")]
    ),
    "a pattern that freezes nothing": Case("model.nothing.*", ("--model.freeze=[model.nothing.*]",)),
    "everything frozen": Case("every parameter of the model is frozen", ("--model.freeze=['*']",)),
    # --- checkpoints
    "flipped bit in the weights": Case(
        "global_step_1", STEP_1, damage_checkpoint(1, "*.distcp", flip_a_bit), fresh=False
    ),
    "flipped bit, two ranks": Case(
        "global_step_1", STEP_1, damage_checkpoint(1, "*.distcp", flip_a_bit), ranks=2, fresh=False
    ),
    "checkpoint cut short": Case("global_step_2", STEP_2, damage_checkpoint(2, "*.distcp", truncate), fresh=False),
    "checkpoint without manifest": Case(
        "global_step_2", STEP_2, damage_checkpoint(2, "*manifest*", Path.unlink), fresh=False
    ),
    "checkpoint that is gone": Case("global_step_9", (STEP_1[0].replace("step_1", "step_9"),), fresh=False),
    "checkpoint of another model": Case(
        "global_step_1",
        (*STEP_1, "--model.config_overrides={{num_hidden_layers: 1, hidden_size: 48, vocab_size: 512}}"),
        fresh=False,
    ),
    "checkpoint of other data": Case(
        "the data differs from the checkpoint's", STEP_1, corpus_of("a.txt", WORDS * 50), fresh=False
    ),
    # --- layout and devices
    "batch that does not divide": Case("train.global_batch_size 7", ("--train.global_batch_size=7",)),
    "replicas that do not divide": Case(
        "data_parallel_replicate_size 3",
        ("--train.devices=2", "--train.data_parallel_mode=fsdp2", "--train.data_parallel_replicate_size=3"),
    ),
    "single in two processes": Case("train.devices", ("--train.devices=2", "--train.data_parallel_mode=single")),
    "an axis that is not built yet": Case("tensor_parallel_size", ("--train.tensor_parallel_size=2",)),
    "no such accelerator": Case("train.accelerator", ("--train.accelerator=tpu",)),
    "CUDA where there is none": Case("CUDA", ("--train.accelerator=cuda",), environment={"CUDA_VISIBLE_DEVICES": ""}),
    "NPU without torch_npu": Case("pip install 'veomni[npu]'", ("--train.accelerator=npu",)),
    "nccl without GPUs": Case("train.backend", ("--train.backend=nccl",)),
    "wandb's key is missing": Case(
        "WANDB_API_KEY",
        ("--train.loggers=[{{name: wandb, mode: online}}]",),
    ),
    # --- the environment
    "half of torchrun's variables": Case("MASTER_ADDR", (), environment={"RANK": "0", "WORLD_SIZE": "2"}),
    "a rank that is no number": Case("LOCAL_RANK", (), environment={**TORCHRUN, "LOCAL_RANK": "x"}),
    "a rank outside the world": Case("RANK=5", (), environment={**TORCHRUN, "RANK": "5", "LOCAL_WORLD_SIZE": "2"}),
    "devices against torchrun": Case(
        "in the configuration: train.devices",
        ("--train.devices=3", "--train.data_parallel_mode=ddp", "--train.global_batch_size=12"),
        environment={**TORCHRUN, "LOCAL_WORLD_SIZE": "2"},
    ),
    "half of Slurm's variables": Case(
        "SLURM_LOCALID", (), environment={"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    ),
}


def options(place: Place, case: Case) -> list[str]:
    given = [argument.format(place=place.folder) for argument in case.arguments]
    defaults = [
        *(f"--{key}={value}" for key, value in SMALL.items()),
        f"--data.train_path={place.corpus}",
        f"--data.cache_dir={place.folder.parent / 'cache'}",
        f"--train.output_dir={place.output}",
        f"--train.devices={case.ranks}",
        f"--train.data_parallel_mode={'single' if case.ranks == 1 else 'fsdp2'}",
        "--train.max_steps=2",
    ]
    keys = {argument.partition("=")[0] for argument in given}
    unique = {argument.partition("=")[0]: argument for argument in defaults}
    file = [] if any(argument.endswith(".yaml") for argument in given) else [str(TINY)]
    return [*file, *given, *[argument for key, argument in unique.items() if key not in keys]]


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
    """What is on disk, logs and locks (and who holds them) aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".log") and path.name not in (".lock", ".holder")
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs that work, and what a run of two steps on them has left."""
    import transformers  # noqa: F401  what every fork would import again

    folder = tmp_path_factory.mktemp("good")
    place = Place(folder)
    place.corpus.mkdir()
    for index, path in enumerate(sorted((ROOT / "veomni").glob("*.py"))):
        (place.corpus / f"{index:02d}.txt").write_text(path.read_text())
    arguments = options(place, Case("", ("--train.checkpoint.save_steps=1", "--train.eval.every_steps=2")))
    code, _ = run_forked(arguments, clean_environment(), folder / "printed")
    assert code == 0, (folder / "printed").read_text()
    split(place.output / "hf", place.model)
    return folder


def split(exported: Path, target: Path) -> None:
    """Save an exported model again as people find them on the hub, in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(target, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(exported).save_pretrained(target)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    case, place = CASES[name], Place(tmp_path / "place")
    shutil.copytree(good, place.folder)
    if case.fresh:
        shutil.rmtree(place.output)
    if case.prepare is not None:
        case.prepare(place)
    before, printed = files(place.folder), tmp_path / "printed"
    environment = {**clean_environment(), "WANDB_API_KEY": "", "HF_HUB_OFFLINE": "1", **case.environment}
    run = run_forked if case.ranks == 1 else run_supervised
    code, group = run(options(place, case), environment, printed)
    said = printed.read_text()
    assert code == 78, said
    assert case.named in said
    assert "fix: " in said
    assert "Traceback" not in said
    assert said.count("fix: ") == 1, "it is said once, not by every rank"
    assert files(place.folder) == before, "nothing but logs may be written"
    with pytest.raises(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_the_inputs_are_good_without_the_damage(good: Path, tmp_path: Path) -> None:
    """Without this, a case could be refused for another reason than its own."""
    place = Place(tmp_path / "place")
    shutil.copytree(good, place.folder)
    for number, arguments in enumerate((MODEL, STEP_2)):
        printed = tmp_path / f"printed{number}"
        code, _ = run_forked(options(place, Case("", arguments)), clean_environment(), printed)
        assert code == 0, printed.read_text()


def test_there_are_enough_kinds() -> None:
    assert len(CASES) >= 40
