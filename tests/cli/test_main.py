"""The ``veomni`` command as people call it, in processes of its own where exit codes matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.config.samples import REPOSITORY, write
from veomni.cli import main
from veomni.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED

TINY = str(REPOSITORY / "configs/text/tiny.yaml")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from veomni.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


@pytest.mark.parametrize("command", [[], ["launch"], ["doctor"], ["plan"], ["data"], ["schema"]])
def test_help_exits_with_0(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: veomni" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lunch"], "'lunch'"),
        (["doctor", "--all"], "--all"),
        (["launch"], "FILE.py"),
        (["launch", "gone.py"], "gone.py"),
        (["plan"], "no configuration file"),
        (["plan", "gone.yaml"], "gone.yaml"),
        (["plan", TINY, "--world", "x"], "--world"),
        (["plan", TINY, "--world", "0"], "--world is 0"),
        (["plan", TINY, "--device-memory", "0"], "--device-memory is 0.0"),
        (["plan", TINY, "--device-memory", "nan"], "--device-memory is nan"),
        (["plan", TINY, "--train.strategies", "[compile, compile]"], "compile is given twice"),
        (["plan", TINY, "--world", "3"], "train.global_batch_size 16"),
        (["plan", TINY, "--train.sed", "1"], "train.sed"),
        (["plan", TINY, "--model.config_path", "no/config.json"], "no/config.json"),
        (["plan", TINY, "--train.tensor_parallel_size", "2"], "train.tensor_parallel_size"),
        (["data", TINY, "--data.train_path", "gone"], "data.train_path: gone"),
    ],
)
def test_bad_input_is_said_without_a_traceback(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == EXIT_BAD_INPUT
    assert said in printed.err
    assert "fix: " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "usage: veomni" in capsys.readouterr().out


def test_a_configuration_is_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", TINY, "--train.seed", "1"])
    assert f"fix: veomni launch examples/train.py {TINY} --train.seed 1" in capsys.readouterr().err


def test_bad_input_ends_the_process_with_78() -> None:
    done = call("plan", TINY, "--train.sed", "1")
    assert done.returncode == EXIT_BAD_INPUT
    assert "did you mean 'seed'" in done.stderr


def test_launch_is_the_script_with_its_arguments_and_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit({EXIT_PREEMPTED})")
    command = [sys.executable, "-c", "from veomni.cli import main; main()"]
    process = subprocess.Popen(
        [*command, "launch", str(script), "a.yaml", "--x", "1", "--help"], stdout=subprocess.PIPE, text=True
    )
    printed, _ = process.communicate()
    assert printed.strip() == f"{process.pid} ['a.yaml', '--x', '1', '--help']", (
        "a process in between would not get signals"
    )
    assert process.returncode == EXIT_PREEMPTED


def test_doctor_says_what_is_there_and_no_secret() -> None:
    done = call("doctor", WANDB_API_KEY="s3cret", HF_TOKEN="s3cret", RANK="0")
    assert done.returncode == 0
    for fact in (metadata.version("torch"), "accelerator cpu", "gloo", "$RANK", sys.executable):
        assert fact in done.stdout
    assert "s3cret" not in done.stdout


def test_schema_is_json_and_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema"])
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["TrainSection"]["properties"]["seed"]["description"]


def test_a_reader_that_stops_early_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from veomni.cli import main; main()", "schema"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.stderr, done.returncode) == ("", 0)


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {line[:28].strip(): line[28:] for line in capsys.readouterr().out.splitlines()}


def test_plan_counts_what_a_rank_holds(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "configs/text/qwen3_8b.yaml", "--world", "8", "--train.max_steps", "10"])
    found = facts(capsys)
    count, gib = 8_190_735_360, 1024**3
    block = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    norm, embedding = 4096, 151_936 * 4096
    assert found["parameters of the model"] == f"{count:,}"
    assert found["parameters per rank"] == f"{count * 4 / 8 / gib:.3f} GiB (device)"
    assert found["optimizer per rank"] == f"{count * 8 / 8 / gib:.3f} GiB (device)"
    assert found["gathered per rank"] == f"{(norm + block + embedding) * 2 / gib:.3f} GiB (device)"
    # 6 FLOPs per weight (no embedding, no norm) and token; 12 per attended pair, in 36 layers of 32 heads of 128.
    tokens, pairs = 64 * 4096, 64 * 4096 * 4097 / 2
    flops = 6 * (count - 151_936 * 4096 - 36 * (2 * 4096 + 2 * 128) - 4096) * tokens + 12 * pairs * 36 * 32 * 128
    assert found["FLOPs per step"].startswith(f"{flops:.4g} causal")
    assert found["rows per step"].startswith("64 = 2 rows x 4 micro-batches x 8 data ranks")
    assert found["tokens in all"] == f"{64 * 4096 * 10:,} in 10 steps"


def test_plan_counts_one_number_for_every_element_of_muons_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "configs/text/qwen3_8b.yaml", "--world", "8", "--train.optimizer.name", "muon"])
    count, layers = 8_190_735_360, 36
    matrices = layers * (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288)
    expected = (2 * count - matrices) * 4 / 8 / 1024**3
    assert facts(capsys)["optimizer per rank"] == f"{expected:.3f} GiB (device)"


def test_plan_counts_two_bytes_for_moments_of_muons_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--train.optimizer.name", "muon", "--train.optimizer.moments", "bf16"]
    main(["plan", "configs/text/qwen3_8b.yaml", "--world", "8", *options])
    matrices = 36 * (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288)
    expected = (4 * matrices + 4 * (8_190_735_360 - matrices)) / 8 / 1024**3
    assert facts(capsys)["optimizer per rank"] == f"{expected:.3f} GiB (device)"


@pytest.mark.parametrize(("name", "moments"), [("adamw_8bit", 2 * (1 + 4 / 256)), ("adamw_bf16", 4)])
def test_plan_counts_the_bytes_of_small_moments(capsys: pytest.CaptureFixture[str], name: str, moments: float) -> None:
    main(["plan", "configs/text/qwen3_8b.yaml", "--world", "8", "--train.optimizer.name", name])
    size, unit, _ = facts(capsys)["optimizer per rank"].split()
    assert unit == "GiB"
    assert float(size) == pytest.approx(8_190_735_360 * moments / 8 / 1024**3, rel=0.005)


def test_plan_knows_replicas_frozen_parameters_and_ddp(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", TINY, "--world", "4", "--train.micro_batch_size", "2"]
    hybrid = ["--train.data_parallel_mode", "fsdp2", "--train.data_parallel_replicate_size", "2"]
    main([*plan, *hybrid, "--model.freeze", "['*embed*']"])
    sharded = facts(capsys)
    main([*plan, "--train.data_parallel_mode", "ddp", "--train.precision", "fp64"])
    replicated = facts(capsys)
    assert sharded["mesh"].startswith("pp 1 x dp_replicate 2 x dp_shard 2")
    assert sharded["parameters of the model"] == f"2,017,344, {2_017_344 - 2048 * 192:,} trained"
    assert replicated["mesh"].startswith("pp 1 x dp_replicate 4 x dp_shard 1")
    assert replicated["parameters per rank"] == f"{2_017_344 * 8 / 1024**2:.3f} MiB (device)"


def test_data_shows_what_is_learned(tmp_path: Path) -> None:
    first = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER\x1b[2J"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": first}) + "\n")
    changes = {"data.train_path": str(tmp_path / "talk.jsonl"), "data.data_type": "conversation"}
    changes |= {
        "data.max_seq_len": 128,
        "train.output_dir": str(tmp_path / "out"),
        "data.cache_dir": str(tmp_path / "cache"),
    }
    done = call("data", str(write(tmp_path / "a.yaml", changes)), FORCE_COLOR="1", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    learned = [part.split("\x1b[0m")[0] for part in done.stdout.split("\x1b[32m")[1:]]
    assert any("ANSWER" in part for part in learned)
    assert not any("QUESTION" in part for part in learned)
    assert "QUESTION" in done.stdout
    assert "\x1b[2J" not in done.stdout, "data must not control the terminal"
    assert "1 rows of 128 tokens" in done.stdout
