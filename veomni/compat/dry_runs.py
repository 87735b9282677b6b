"""What measurements of a step read of torch: the breaks of compiled graphs, and collectives among ranks not there."""

import torch.distributed as dist


def graph_breaks() -> int:
    """Return how often Dynamo has left a graph in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def join_fake_ranks(world_size: int) -> None:
    """Make a process group, of which this process is rank 0 and no other rank exists: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
