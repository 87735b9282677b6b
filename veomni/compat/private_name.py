"""How a name that another package does not export is declared: once, with its reason; and all such names of torch."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """A name that veomni relies on although its package does not promise to keep it.

    A contract test resolves all of them, and their ``parameters`` that are passed by name, on both ends of the
    supported range. ``path`` is ``module:qualified.name``, ``module:Class().name`` of an attribute that only instances
    have. ``reason`` is what it is used for; ``without``, what happens under a release that lacks it; ``device``, the
    device that torch must be built for to have it.
    """

    path: str
    reason: str
    without: str
    parameters: tuple[str, ...] = ()
    device: str = "cpu"

    def resolve(self) -> Any:
        """Return the object; an AttributeError where the installed release lacks it."""
        module, _, names = self.path.partition(":")
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name.removesuffix("()"))
            found = found() if name.endswith("()") else found
        return found


_ATEN, _RING = "torch:ops.aten._scaled_dot_product", "ring attention adds parts up by their lse"
_FOREACH, _LOOP = "one launch for all parameters instead of one for each", "a loop over tensors: exact, and slower"
_FSDP, _HANDLE = "torch.distributed.fsdp", "torch.distributed.fsdp._flat_param:FlatParamHandle"
_STORED, _UNREADABLE = "torch.distributed.checkpoint", "no checkpoint can be read: allow what has its new name"
_MARKS, _UNMARKED = "torch:ops.profiler._record_function", "selective checkpointing of experts under FSDP2 fails"
_COUNTED = "from torch 2.13 on, each operation of a recomputation must have one in the forward"
_COPIED = "removes hooks that a copy came with"
_GLOO = "torch.distributed:ProcessGroupGloo"
_OPTIONS, _LOOPS = "torch gives the constructor of a gloo group no options", "each gloo group has its own event loop"
_HISTORY, _NO_SNAPSHOT = "the history of a device's allocations has no public name", "no memory snapshots"

PRIVATE = tuple(
    PrivateName(*fields)
    for fields in (
        # allocations
        ("torch.cuda.memory:_set_allocator_settings", "the environment is read before a launcher exists",
         "sizes that differ from step to step fragment memory"),
        ("torch.cuda.memory:_record_memory_history", _HISTORY, _NO_SNAPSHOT, ("enabled", "max_entries", "stacks")),
        ("torch.cuda.memory:_dump_snapshot", _HISTORY, _NO_SNAPSHOT, ("filename",)),
        ("torch:_C._cuda_attach_out_of_memory_observer", "writes the history before the error frees what it shows",
         "no snapshot where memory runs out", (), "cuda"),
        # attention_kernels
        (f"{_ATEN}_flash_attention", _RING, "the slower math kernel", ("is_causal",)),
        (f"{_ATEN}_flash_attention_backward", _RING, "the slower math kernel",
         ("logsumexp", "philox_seed", "philox_offset")),
        (f"{_ATEN}_efficient_attention", _RING, "the slower math kernel", ("attn_bias", "compute_log_sumexp")),
        (f"{_ATEN}_efficient_attention_backward", _RING, "the slower math kernel",
         ("attn_bias", "logsumexp", "grad_input_mask")),
        (f"{_ATEN}_cudnn_attention", "1.7 times as fast as FlashAttention 2 on an H200",
         "varlen's kernel for dense rows too", ("attn_bias", "compute_log_sumexp", "return_debug_mask")),
        (f"{_ATEN}_cudnn_attention_backward", _RING, "FlashAttention 2, half as fast on an H100",
         ("logsumexp", "philox_seed", "philox_offset")),
        ("torch:ops.aten._flash_attention_forward", _RING, "a mask for each pair of chunks",
         ("cum_seq_q", "cum_seq_k", "max_q", "max_k")),
        ("torch:ops.aten._flash_attention_backward", _RING, "a mask for each pair of chunks",
         ("logsumexp", "rng_state", "unused")),
        # collectives
        ("torch.distributed:_broadcast_coalesced",
         "one message for many tensors, as DDP sends its own: a message per tensor costs its latency",
         "broadcast tensor by tensor"),
        ("torch.distributed.distributed_c10d:_set_pg_timeout",
         "a mesh makes its groups with the backend's default timeout, not with that of the world",
         "collectives of a mesh wait for the backend's default timeout", ("timeout", "group")),
        ("torch.distributed.distributed_c10d:_resolve_process_group",
         "an operation of a compiled graph is given the name of a group, since a graph cannot hold the group",
         "blocks are compiled in pieces around their exchanges"),
        ("torch:ops._c10d_functional.all_to_all_single", "an exchange in flight in a compiled graph",
         "asynchronous exchanges break graphs", ("output_split_sizes", "input_split_sizes", "group_name")),
        ("torch:ops._c10d_functional.wait_tensor", "an exchange in flight in a compiled graph",
         "asynchronous exchanges break graphs"),
        ("torch.distributed.device_mesh:DeviceMesh._flatten",
         "one axis of several, which shares the groups of its mesh",
         "make a mesh for each view, with groups of its own", ("mesh_dim_name",)),
        # gloo
        (f"{_GLOO}.__init__", _OPTIONS, _LOOPS),
        (f"{_GLOO}._Options()._devices", _OPTIONS, _LOOPS),
        (f"{_GLOO}._Options()._threads", _OPTIONS, _LOOPS),
        (f"{_GLOO}._Options()._timeout", _OPTIONS, _LOOPS),
        # modules
        ("torch:_C._current_graph_task_id", "distinguishes a recomputed forward", "AttributeError"),
        ("torch.nn:Module._compiled_call_impl", "Module.compile() keeps the compiled call there, and has no way back",
         "a compiled module cannot be given back plain"),
        ("torch.nn:Module._call_impl", "inputs of blocks are offloaded around their hooks, whose casts are saved too",
         "surround the forward: inputs that FSDP casts stay on the device"),
        ("torch.nn:Module()._forward_hooks", _COPIED, "AttributeError"),
        ("torch.nn:Module()._forward_pre_hooks", _COPIED, "AttributeError"),
        ("torch:ops.aten._scaled_mm", "a selective recomputation counts products in float8 as it counts others",
         "it runs all of them again"),
        (f"{_MARKS}_enter_new", _COUNTED, _UNMARKED),
        (f"{_MARKS}_exit", _COUNTED, _UNMARKED),
        # sharding
        ("torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
         "parameters that are shards, as experts on several ranks are, must not be broadcast and averaged",
         "DDP beside expert parallelism is not possible: it would overwrite every rank's experts by rank 0's",
         ("module", "params_and_buffers_to_ignore")),
        (f"{_FSDP}:ShardingStrategy._HYBRID_SHARD_ZERO2", 'FSDP1(replicate=2, sharding="grad_op")',
         "reject that combination"),
        (f"{_FSDP}._runtime_utils:_reshard",
         "a forward without a backward leaves parameters gathered, and an optimizer would step on the copies",
         "train wrongly after an evaluation between forward and step: reject FSDP1",
         ("state", "handle", "free_unsharded_flat_param")),
        (f"{_HANDLE}.uses_sharded_strategy", "whether a unit shards", "see _reshard"),
        (f"{_HANDLE}.needs_unshard", "whether a unit is gathered", "see _reshard"),
        (f"{_FSDP}._fully_shard._fsdp_collectives:foreach_reduce_scatter_copy_in",
         "torch 2.11 has no way to replace the operation behind it, so the function that calls it is replaced",
         "FSDP2 copies as PyTorch does: exact, and slower for many large parameters",
         ("unsharded_grads", "reduce_scatter_input", "world_size")),
        ("torch:_chunk_cat", "pads gradients that do not divide", "pad them one by one"),
        # optimizers
        ("torch.optim:Adam._init_group", "the one place where parameters become the lists that are updated",
         "updates go through the dispatch of DTensors: exact, and 4 ms of the host for 300 parameters",
         ("group",)),
        ("torch.distributed.tensor:DTensor._local_tensor", "to_local() takes 2 us for each of four tensors a parameter",
         "call to_local()"),
        ("torch._dynamo.utils:disable_cache_limit", "one graph for each shape: eight are the limit",
         "set torch._dynamo.config.recompile_limit, or run the operations one by one"),
        # safe_pickle
        (f"{_STORED}.filesystem:_StorageInfo", "where the bytes of a tensor lie", _UNREADABLE),
        (f"{_STORED}.metadata:_MEM_FORMAT_ENCODING", "the memory format of a tensor", _UNREADABLE),
        ("torch.serialization:_get_layout", "the function that the layout of a tensor is pickled as", _UNREADABLE,
         ("name",)),
        # dry_runs
        ("torch._dynamo.utils:counters", "benchmarks print the breaks of compiled graphs", "no such figure"),
        ("torch.testing._internal.distributed.fake_pg:FakeStore",
         "benchmarks count the bytes of collectives without other ranks", "formulas are compared with nothing"),
        # tensors
        ("torch:_foreach_mul_", _FOREACH, _LOOP),
        ("torch:_foreach_lerp_", _FOREACH, _LOOP),
        ("torch:_foreach_norm", _FOREACH, _LOOP),
        ("torch.distributed.tensor._utils:compute_local_shape_and_global_offset",
         "the place of a rank's shard in the whole tensor, for weights that are read shard by shard",
         "every rank reads whole tensors", ("global_shape", "mesh", "placements")),
        ("torch.distributed.tensor:DTensor._spec",
         "copies a shard to host memory: DTensor.from_local moves it to the mesh's device",
         "no save in the background with 8-bit moments"),
        ("torch:Tensor._version", "whether a tensor was changed in place since it was given",
         "shared experts do not run ahead"),
        ("torch:UntypedStorage._cdata", "distinguishes storages on the meta device", "AttributeError"),
        ("torch:ops.aten.add_.Tensor._schema", "marks operations that write", "AttributeError"),
        ("torch.utils._python_dispatch:TorchDispatchMode",
         "keeps float64 where modeling code names float32; records what a constructor writes on meta tensors",
         "fp64 runs and initialization by tracing are not possible"),
    )
)  # fmt: skip
"""The private names of torch, by the file of this package that uses them."""
