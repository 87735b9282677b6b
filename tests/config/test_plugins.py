"""Every entry-point group is reached from a configuration, with the options of what it brings."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
import yaml

from tests.config.samples import REPOSITORY, config, values
from tests.examples.script import SHORT, train
from tests.ops.experts.modules import experts
from tests.strategies.test_plugins import PLUGIN
from veomni.config.keys import all_keys
from veomni.errors import ConfigError, ModelError
from veomni.ops.experts.backends import choose_backend
from veomni.run_config import Config

CHOSEN = {
    "train.data_parallel_mode": "flat_allreduce",
    "train.accelerator": {"name": "slow_cpu", "reserve": 1024},
    "train.optimizer": {"name": "lion", "lr": 1e-3, "betas": [0.5, 0.75], "weight_decay": 0.25},
    "train.scheduler": {
        "name": "inverse_sqrt",
        "warmup_steps": 1,
        "offset": 3,
        "warmup_ratio": None,
        "min_lr_ratio": None,
    },
    "train.loggers": [{"name": "csv", "columns": ["loss", "lr"]}, "tensorboard"],
    "model.attention": {"name": "scaled", "temperature": 2.0},
    "model.experts": "looped",
    "data.data_type": {"name": "reversed", "skip": 1},
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    yield
    for name in ("veomni_thirdparty", "veomni_flat_allreduce"):
        sys.modules.pop(name, None)


def chosen(**changes) -> Config:
    return config(**{key.replace(".", "__"): value for key, value in {**CHOSEN, **changes}.items()})


def test_each_is_built_with_its_options():
    train = chosen().train
    (strategy,) = train.build_strategies()
    assert strategy.name == "flat_allreduce"
    assert train.accelerator.build().reserve == 1024
    layer = torch.nn.Linear(3, 3)
    optimizer = train.optimizer.build(layer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert optimizer.defaults["betas"] == (0.5, 0.75)
    schedule = train.scheduler.build(optimizer, 10)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(1e-3 * (4 / 6) ** 0.5)
    assert train.loggers[0].build(output_dir="x").columns == ["loss", "lr"]
    assert chosen().model.attention.build().temperature == 2.0
    assert chosen().data.data_type.build().skip == 1
    form = {"name": "question_answer", "system": "Be brief."}
    assert chosen(**{"data.format": form, "data.data_type": "conversation"}).data.format.build().system == "Be brief."


def test_a_backend_of_experts_is_chosen_where_it_can_run():
    from veomni_thirdparty import LoopedExperts

    assert choose_backend([experts("qwen3_moe")], "looped", ("loop",), torch.float32) == "looped"
    with pytest.raises(ModelError, match="experts looped cannot run this model: it computes in fp32, not in bf16"):
        choose_backend([experts("qwen3_moe")], "looped", ("loop",), torch.bfloat16)
    (problem,) = LoopedExperts.config_problems("looped", chosen(**{"train.precision": "fp64"}).train)
    assert problem.problem == "model.experts looped does not compute in fp64"


def test_they_are_saved_and_read_again(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(chosen().model_dump()))
    assert Config.from_file(path) == chosen()


def test_their_options_are_keys_that_are_checked(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(values({"train.scheduler": {"name": "inverse_sqrt", "offset": 0, "ofset": 2}})))
    with pytest.raises(ConfigError) as caught:
        Config.from_file(path)
    assert "train.scheduler.offset" in caught.value.problem
    assert "greater than or equal to 1" in caught.value.problem
    assert "did you mean 'offset'" in caught.value.problem
    path.write_text(yaml.safe_dump(values({"train.loggers": [{"name": "csv", "colums": ["loss"]}]})))
    with pytest.raises(ConfigError, match=r"train.loggers.0.colums .*\n.*did you mean 'columns'"):
        Config.from_file(path)
    assert {
        "train.scheduler.offset",
        "train.optimizer.betas",
        "model.attention.temperature",
        "data.data_type.skip",
    } <= set(all_keys(Config))
    assert "reserve" in json.dumps(Config.model_json_schema())


def test_two_ranks_train_with_all_of_them(tmp_path):
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in CHOSEN.items()}
    texts |= {
        "model.config_path": str(REPOSITORY / "configs/model_configs/tiny_qwen3_moe.json"),
        "train.precision": "fp32",
        "data.eval_fraction": 0,
        "data.max_documents": 4,
    }
    short = {key: value for key, value in SHORT.items() if not key.startswith("train.optimizer.")}
    lines = train(REPOSITORY / "docs", tmp_path, 2, "flat_allreduce", {**short, **texts})
    written = list(csv.reader((tmp_path / "metrics.csv").open()))
    assert [float(row[1]) for row in written] == pytest.approx([line["loss"] for line in lines])
    rates = [1e-3 * share for share in (0.5, 1.0, (4 / 5) ** 0.5)]
    assert [float(row[2]) for row in written] == pytest.approx(rates)
