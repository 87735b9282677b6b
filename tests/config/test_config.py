"""Loading, overriding and the schema's own promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.config.samples import config, write
from veomni.config.keys import walk
from veomni.run_config import Config, check_layout, load_config


def test_a_learning_rate_of_1e_4_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(write(tmp_path / "b.yaml").read_text() + "  optimizer:\n    lr: 1e-4\n")
    assert load_config([str(path)]).train.optimizer.lr == 1e-4


def test_both_ways_of_writing_an_override_work_and_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"train.seed": 1, "train.optimizer": {"lr": 0.5, "eps": 0.1}})
    loaded = load_config(
        ["--train.seed", "2", str(path), "--train.optimizer.lr=1e-3", "--train.optimizer.betas", "[0.8, 0.9]"]
        + ["--model.config_overrides.num_hidden_layers", "2", "--data.train_path", f"[{tmp_path}, python-stdlib]"]
    )
    assert (loaded.train.seed, loaded.train.optimizer.lr, loaded.train.optimizer.eps) == (2, 1e-3, 0.1)
    assert loaded.train.optimizer.betas == [0.8, 0.9]
    assert loaded.model.config_overrides == {"num_hidden_layers": 2}
    assert loaded.data.train_path == [str(tmp_path), "python-stdlib"]


def test_overrides_in_a_program_merge_groups_and_leave_their_mapping_alone(tmp_path: Path) -> None:
    overrides = {"train.optimizer": {"lr": 0.25}, "train.max_steps": 7}
    path = write(tmp_path / "a.yaml", {"train.optimizer": {"eps": 0.1}})
    loaded = Config.from_file(path, overrides)
    assert (loaded.train.optimizer.lr, loaded.train.optimizer.eps, loaded.train.max_steps) == (0.25, 0.1, 7)
    assert overrides == {"train.optimizer": {"lr": 0.25}, "train.max_steps": 7}


def test_the_same_flag_twice_with_one_value_is_no_contradiction(tmp_path: Path) -> None:
    assert load_config([str(write(tmp_path / "a.yaml")), "--train.seed", "3", "--train.seed=3"]).train.seed == 3


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config.from_file(write(tmp_path / "a.yaml", {"train.output_dir": "~/x"})).train.output_dir == f"{tmp_path}/x"


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().train.seed = 3  # type: ignore[misc]


def test_help_prints_every_key_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{key}\n" in printed for key, _ in walk(Config) if "." in key)


def test_every_key_is_described() -> None:
    assert [key for key, field in walk(Config) if not field.description] == []
    assert len(list(walk(Config))) > 80


def test_the_json_schema_refuses_unknown_keys() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))


def test_a_configuration_is_read_without_building_anything(tmp_path: Path) -> None:
    code = f"""
import sys
import veomni.config.base, veomni.config.yaml_file, veomni.config.overrides
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
import veomni.run_config
veomni.run_config.load_config([{str(write(tmp_path / "a.yaml"))!r}])
print([name for name in ("transformers", "huggingface_hub", "torchmetrics", "matplotlib") if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines() == ["[]", "[]"]


@pytest.mark.parametrize(
    ("changes", "device", "count", "processes"),
    [
        ({"train.devices": 3}, "cuda", 8, 3),
        ({}, "cuda", 8, 8),
        ({"train.cpu_devices": 2}, "cpu", 1, 2),
        ({"train.cpu_devices": 2}, "npu", 4, 4),
        ({"train.cpu_devices": 2, "train.data_parallel_mode": "single"}, "cpu", 1, 1),
    ],
)
def test_auto_devices(changes: dict[str, object], device: str, count: int, processes: int) -> None:
    train = config(**{key.replace(".", "__"): value for key, value in changes.items()}).train
    assert train.local_processes(device, count) == processes


def test_batch_arithmetic() -> None:
    wide = config(train__global_batch_size=48, train__micro_batch_size=2, train__data_parallel_replicate_size=2)
    check_layout(wide, 4)
    assert (wide.train.data_ranks(4), wide.train.micro_batches(4)) == (4, 6)
    assert config(train__ulysses_parallel_size=2, train__tensor_parallel_size=2).train.data_ranks(8) == 2
