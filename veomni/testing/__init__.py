"""For tests of the library and of its plugins: a float64 oracle, ranks in forked processes, seams for seeded bugs."""
