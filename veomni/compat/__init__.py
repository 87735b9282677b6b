"""Private names of torch: each once, with its reason and what happens without it; measured on torch 2.11 to 2.13.

:func:`install` replaces functions of torch that cannot be replaced for one model; the launcher calls it once.
"""

from __future__ import annotations


def install() -> None:
    """Change functions of torch for all models, without a change of results; calling it again changes nothing."""
    from veomni.compat import modules, sharding

    sharding.install_copy_in()
    modules.ignore_profiler_marks()


def uninstall() -> None:
    """Put back torch's own."""
    from veomni.compat import modules, sharding

    sharding.uninstall_copy_in()
    modules.count_profiler_marks()
