"""Transforms of a model that compose with every strategy: precision, recomputation, compilation, balance."""
