"""Muon: momentum, orthogonalised, for the matrices of hidden layers; whole, sharded, or stacked as experts are."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from veomni.compat.tensors import lerp, multiply
from veomni.errors import ModelError
from veomni.optim.matrix_owners import Matrix, MatrixOwners, find_matrices
from veomni.parallel.wrappers import local_shard

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7
_ADAMW_RMS = 0.2


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Push all singular values of every matrix of ``[batch, rows, columns]`` towards 1, and keep its singular vectors.

    Each matrix is divided by its Frobenius norm, then ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` is repeated
    (Newton-Schulz), which maps every singular value ``s`` to ``a s + b s^3 + c s^5``. The coefficients are Jordan's
    (https://kellerjordan.github.io/posts/muon/): five steps bring values from 0.003 up to between 0.68 and 1.21. A
    matrix of zeros stays one.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(Optimizer):
    """Step along the orthogonalised momentum of every matrix (Jordan: https://kellerjordan.github.io/posts/muon/).

    With gradient ``G``, momentum ``mu`` and ``[rows, columns]`` matrices::

        M <- mu M + (1 - mu) G
        U  = orthogonalize((1 - mu) G + mu M)            (nesterov; otherwise of M)
        W <- (1 - lr weight_decay) W - 0.2 sqrt(max(rows, columns)) lr U

    The factor gives a step the root mean square that AdamW's typically has, so that AdamW's learning rate and weight
    decay can be used (Liu et al., arXiv:2502.16982). A three-dimensional parameter is a stack of matrices,
    one per expert; each is orthogonalised as it is stored, a fused gate and up projection as one matrix.
    Orthogonalising takes ``ns_steps`` Newton-Schulz steps in bf16, in float64 for float64 parameters.

    Sharded matrices are gathered at one rank each: see :mod:`veomni.optim.matrix_owners`. The results do not depend on
    the layout. A parameter is left alone when no rank has a gradient for it; a rank without takes part with zeros.
    Parameters of other dimensions, and of several device meshes, are a ModelError.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 3e-4, *, weight_decay: float = 0.1,
        momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5,
    ) -> None:  # fmt: skip
        self._owners: dict[tuple[int, ...], list[MatrixOwners]] = {}
        self._mesh: DeviceMesh | None = None
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self._parameters():
            if parameter.ndim not in (2, 3):
                raise ModelError(
                    f"muon updates matrices and stacks of them; a parameter has the shape {list(parameter.shape)}",
                    "give the others to AdamW, as build_optimizer's muon does; FSDP1's flat shards have lost their "
                    "shapes: use FSDP2",
                )
        meshes = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in self._parameters()}
        if len(meshes) > 1:
            raise ModelError("muon was given parameters on several device meshes", "use one optimizer for each mesh")
        (self._mesh,) = meshes

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters; collective where they are sharded."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        trained = self._with_gradient()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in trained]
            if parameters:
                self._update(parameters, group)
        return loss

    def _with_gradient(self) -> set[nn.Parameter]:
        """Return the parameters that some rank has a gradient for, the same on all ranks."""
        parameters = self._parameters()
        have = [parameter.grad is not None for parameter in parameters]
        if self._mesh is not None:
            flags = torch.tensor(have, dtype=torch.int32)  # on the host, which would wait for the device
            for axis in range(self._mesh.ndim):
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._mesh.get_group(axis))
            have = flags.tolist()
        return {parameter for parameter, trained in zip(parameters, have, strict=True) if trained}

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        weights = [local_shard(parameter) for parameter in parameters]
        gradients = [_local_gradient(parameter) for parameter in parameters]
        means = [local_shard(self._mean(parameter)) for parameter in parameters]
        lerp(means, gradients, 1 - momentum)
        multiply(weights, 1 - lr * group["weight_decay"])

        def direction(matrix: Matrix) -> Tensor:
            mean = matrix.of(means[matrix.parameter])
            return matrix.of(gradients[matrix.parameter]).lerp(mean, momentum) if group["nesterov"] else mean

        for owners in self._owners_of(parameters):
            for matrix, step in owners.run(direction, partial(orthogonalize, steps=group["ns_steps"])):
                weight = matrix.of(weights[matrix.parameter])
                weight.add_(step.to(weight), alpha=-lr * _ADAMW_RMS * math.sqrt(max(matrix.shape)))

    def _mean(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        mean: Tensor = state["momentum_buffer"]
        return mean

    def _owners_of(self, parameters: list[nn.Parameter]) -> list[MatrixOwners]:
        key = tuple(map(id, parameters))
        if key not in self._owners:
            wide = any(parameter.dtype == torch.float64 for parameter in parameters)
            dtype = torch.float64 if wide else torch.bfloat16
            device = parameters[0].device if self._mesh is None else torch.device(self._mesh.device_type)
            found = find_matrices(parameters)
            self._owners[key] = [MatrixOwners(holders, found[holders], device, dtype) for holders in found]
        return self._owners[key]


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(local_shard(parameter)) if parameter.grad is None else local_shard(parameter.grad)
