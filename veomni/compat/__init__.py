"""Private names of torch: each once, with its reason and what happens without it; measured on torch 2.11 to 2.13.

:func:`install` replaces functions of torch that cannot be replaced for one model; the launcher calls it once.
"""


def install() -> None:
    """Change functions of torch for all models, without a change of results; calling it again changes nothing."""
    from torch.utils.checkpoint import SAC_IGNORED_OPS

    from veomni.compat import gloo, modules, sharding

    gloo.share_loop()
    sharding.replace_copy_in(sharding.copy_gradients)
    SAC_IGNORED_OPS.update(modules.profiler_marks())


def uninstall() -> None:
    """Restore torch's functions."""
    from torch.utils.checkpoint import SAC_IGNORED_OPS

    from veomni.compat import gloo, modules, sharding

    gloo.use_own_loops()
    sharding.replace_copy_in(sharding.TORCH_COPY_IN)
    SAC_IGNORED_OPS.difference_update(modules.profiler_marks())
