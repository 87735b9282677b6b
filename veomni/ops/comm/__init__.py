"""Collectives with gradients: all-to-all and ring."""
