"""The section ``train``: layout, arithmetic, length and outputs of a run."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import nn
from typing_extensions import override

from veomni.accelerators.base import ACCELERATORS
from veomni.config.base import PathText, Section
from veomni.config.choice import Choice, Options, check_name, configured
from veomni.config.paths import is_directory, is_writable
from veomni.config.problems import Problem
from veomni.config.section import ComponentSection, options_of
from veomni.launcher import Launcher
from veomni.loggers.base import LOGGERS
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.loop.profile import Profile
from veomni.loop.reporter import Reporter
from veomni.metrics.activation_memory import ActivationMemory
from veomni.moe.options import MoEOptions
from veomni.optim import OPTIMIZERS, SCHEDULERS, OptimizerSection, SchedulerSection
from veomni.run_config.train_problems import contradictions, layout_problems
from veomni.strategies import (
    ActivationCheckpointing,
    Compile,
    ContextParallel,
    EncoderBalance,
    Float8,
    Strategy,
    Ulysses,
)  # fmt: skip
from veomni.strategies.base import STRATEGIES, ParameterStrategy
from veomni.strategies.expert_parallel import ExpertParallel
from veomni.strategies.transforms.activation_budget import ActivationBudget, Budget
from veomni.strategies.transforms.precision import select_precision

AxisSize = Annotated[int, Field(ge=1)]

_PARAMETERS = Choice(
    STRATEGIES, sibling="data_parallel_mode", kind=ParameterStrategy, replicate="train.data_parallel_replicate_size"
)
_EXPERT_OPTIONS = Options(ExpertParallel, size="train.expert_parallel_size")
_ULYSSES = Options(Ulysses, size="train.ulysses_parallel_size", validate_batches="train.validate_batches")
_OPTIMIZERS = Choice(OPTIMIZERS, base=OptimizerSection, default="adamw", params="")
_SCHEDULERS = Choice(SCHEDULERS, base=SchedulerSection, default="cosine")
_CHECKPOINTS = Options(CheckpointSchedule, directory="train.output_dir", signature="")
_LOGGERS = Choice(LOGGERS, output_dir="train.output_dir")
_REPORTS = Options(
    Reporter, output_dir="train.output_dir", loggers="train.loggers", log_every="train.log_every", config="",
    profile="train.profile",
)  # fmt: skip
_OPTIONS: Any = options_of(
    Launcher, Launcher.setup_model, Launcher.track, Reporter,
    supplied=(
        "strategy", "accelerator", "precision", "devices", "self", "model", "router", "loader", "max_steps",
        "output_dir", "loggers", "progress_bar", "plot", "config", "profile",
    ),
)  # fmt: skip


class EvalSection(Section):
    """Evaluation on ``data.eval_path``, or on ``data.eval_fraction`` of the training documents."""

    every_steps: int | None = Field(default=None, ge=1, description="Steps between evaluations; null does none.")
    max_batches: int | None = Field(default=None, ge=1, description="Batches of each; null reads all held-out data.")


class ExportSection(Section):
    """What is written at the end besides the checkpoint."""

    hf: bool = Field(default=False, description="Write <output_dir>/hf, which transformers' from_pretrained loads.")


class TrainSection(_OPTIONS):
    """Layout, arithmetic, length and outputs of a run."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    configures = ("Launcher", "setup_model", "track", "BatchShape")
    renames: ClassVar[Mapping[str, str]] = {
        "ContextParallel.size": "context_parallel_size",
        "ActivationBudget.memory": "activation_memory",
        "Float8.recipe": "float8",
    }

    data_parallel_mode: str = "fsdp2"
    """The registered strategy that holds the parameters: single, ddp, fsdp1, fsdp2, or another package's."""
    strategy: Annotated[ComponentSection, _PARAMETERS] = configured({}, "Options of data_parallel_mode's strategy.")
    data_parallel_replicate_size: AxisSize = 1
    """Replicas of the sharded model (HSDP), with fsdp1 and fsdp2; the rest of the ranks share one."""
    tensor_parallel_size: AxisSize = 1
    """Ranks that share each matrix product."""
    expert_parallel_size: AxisSize = 1
    """Ranks that share the experts of a mixture-of-experts model."""
    expert_parallel: Annotated[ComponentSection, _EXPERT_OPTIONS] = configured({}, "How tokens reach experts.")
    ulysses_parallel_size: AxisSize = 1
    """Ranks that share each row, exchanging attention heads."""
    ulysses: Annotated[ComponentSection, _ULYSSES] = configured({}, "How Ulysses exchanges heads.")
    context_parallel_size: AxisSize = 1
    """Ranks that share each row, exchanging keys and values."""
    strategies: list[Annotated[ComponentSection, Choice(STRATEGIES)]] = Field(default=[])
    """Further registered strategies and transforms, each a name, or a mapping of its name and options."""
    validate_batches: bool = False
    """Check in every micro-batch that ranks which share a row were given the same one."""
    precision: Literal["fp64", "fp32", "bf16"] = "fp32"
    """Number format of compute. bf16 keeps weights, gradients and optimizer state in fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Format that bf16 runs sum gradients in."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Multiply in linear layers of blocks in float8, by torchao, with a scale for each tensor, or row and column."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in the backward: per block (full), or all but the most expensive ops (selective)."""
    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in host memory, copied while the device computes."""
    activation_memory: Budget | None = None
    """Device memory for activations (40 GiB); chooses the fastest of recomputation, offload and MLP tiles that fits."""
    compile: bool = False
    """Compile each block with torch.compile."""
    balance_encoders: bool = False
    """Encode whole images, videos and audio on the ranks whose encoders have least to do."""
    router: Annotated[ComponentSection, Options(MoEOptions)] = configured({}, "Balancing and reports of MoE layers.")
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows per forward on each data rank."""
    global_batch_size: int = Field(ge=1)
    """Rows of data.max_seq_len tokens per optimizer step, over all ranks."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps to train for, however often the data is read; null goes by epochs."""
    num_train_epochs: int = Field(default=1, ge=1)
    """Passes over the data, when max_steps is null."""
    optimizer: Annotated[OptimizerSection, _OPTIMIZERS] = configured("adamw", "The optimizer, and its options.")
    scheduler: Annotated[SchedulerSection, _SCHEDULERS] = configured("cosine", "The learning rate over time.")
    max_grad_norm: Annotated[float, Field(gt=0.0, allow_inf_nan=True)] = 1.0
    """Gradients are scaled down to this 2-norm; .inf only measures it."""
    devices: AxisSize | Literal["auto"] = "auto"
    """Processes to start on this node; auto is one per accelerator, or cpu_devices without any."""
    cpu_devices: AxisSize = 1
    """Processes that devices: auto starts on a machine without accelerator."""
    accelerator: Annotated[ComponentSection, Choice(ACCELERATORS)] = configured("auto", "Device family; auto finds it.")
    output_dir: PathText
    """Directory that everything a run writes goes to."""
    checkpoint: Annotated[ComponentSection, _CHECKPOINTS] = configured({}, "Saving and resuming.")
    export: ExportSection = ExportSection()
    """What is written at the end."""
    eval: EvalSection = EvalSection()
    """Evaluation on held-out data."""
    logging: Annotated[ComponentSection, _REPORTS] = configured({}, "What is shown and drawn besides metrics.jsonl.")
    profile: Annotated[ComponentSection, Options(Profile)] = configured({}, "Traces of steps, and of their memory.")
    loggers: list[Annotated[ComponentSection, _LOGGERS]] = Field(default=[])
    """Where metrics go besides metrics.jsonl: wandb, tensorboard or another package's, a name or its mapping."""

    @field_validator("precision", mode="before")
    @classmethod
    def _is_supported(cls, name: Any) -> Any:
        if name in ("fp16", "float16"):
            raise PydanticCustomError("fp16", "'fp64', 'fp32' or 'bf16': fp16 is not supported, use 'bf16'")
        return name

    @field_validator("data_parallel_mode")
    @classmethod
    def _holds_parameters(cls, name: str) -> str:
        if not issubclass(STRATEGIES.get(check_name(STRATEGIES, name)), ParameterStrategy):
            raise PydanticCustomError("no_owner", "a strategy that holds parameters; list others in train.strategies")
        return name

    def build_strategies(self, row_length: int = 1) -> list[Strategy]:
        """Return the strategy that holds the parameters, then the others; ``row_length`` is the tokens of a row."""
        found: list[Strategy] = [self.strategy.build(replicate=self.data_parallel_replicate_size)]
        if self.expert_parallel_size > 1:
            found.append(self.expert_parallel.build(size=self.expert_parallel_size))
        if self.context_parallel_size > 1:
            found.append(ContextParallel(self.context_parallel_size, validate_batches=self.validate_batches))
        if self.ulysses_parallel_size > 1:
            found.append(self.ulysses.build(size=self.ulysses_parallel_size, validate_batches=self.validate_batches))
        if self.float8 != "none":
            found.append(Float8(self.float8))
        if self.activation_checkpointing != "none":
            found.append(ActivationCheckpointing(self.activation_checkpointing, offload=self.activation_offload))
        if self.activation_memory is not None:
            found.append(ActivationBudget(self.activation_memory, self.row_tokens(row_length)))
        found += [Compile()] * self.compile + [EncoderBalance()] * self.balance_encoders
        return [*found, *(section.build() for section in self.strategies)]

    def local_processes(self, device_type: str, device_count: int) -> int:
        """Return how many processes a node of so many devices of a type ("cpu", "cuda") starts."""
        if self.devices != "auto":
            return self.devices
        if self.data_parallel_mode == "single":
            return 1
        return self.cpu_devices if device_type == "cpu" else device_count

    @property
    def ranks_per_row(self) -> int:
        """Ranks that work on the same rows."""
        return self.tensor_parallel_size * self.ulysses_parallel_size * self.context_parallel_size

    def row_tokens(self, row_length: int) -> int:
        """Return the tokens of a forward on a rank, for rows of ``row_length`` tokens."""
        return self.micro_batch_size * -(-row_length // self.ranks_per_row)

    @property
    def fixed_exchange(self) -> bool:
        """Whether every token is sent to all ranks that share experts."""
        return self.expert_parallel.arguments().get("exchange") == "fixed"

    def count_activations(self, model: nn.Module) -> ActivationMemory:
        """Return the activations of a model under this layout; ConfigError for a model that is not counted."""
        from veomni.models import derive_plan

        itemsize, ranks = select_precision(self.precision).compute.itemsize, self.expert_parallel_size
        plan, fixed = derive_plan(model), self.fixed_exchange
        return ActivationMemory.of(model, plan, itemsize, expert_ranks=ranks, fixed_exchange=fixed)

    def data_ranks(self, world_size: int) -> int:
        """Return how many ranks, or groups of them, read different rows."""
        return world_size // self.ranks_per_row

    def micro_batches(self, world_size: int) -> int:
        """Return how many micro-batches each data rank accumulates in an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_ranks(world_size))

    @override
    def path_problems(self) -> Iterator[Problem]:
        yield from is_writable("train.output_dir", self.output_dir)
        resume = self.checkpoint.arguments()["resume"]
        if resume not in ("auto", "none"):
            yield from is_directory("train.checkpoint.resume", resume, "auto or none also work")

    @override
    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        return contradictions(self) if world is None else layout_problems(self, world)
