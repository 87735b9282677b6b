"""For tests of the library and of its plugins: a float64 oracle, ranks in forked processes, and seams for seeded bugs.

Import from the modules: ``veomni.testing.seams``, ``veomni.testing.ranks``, ``veomni.testing.oracle``.
"""
