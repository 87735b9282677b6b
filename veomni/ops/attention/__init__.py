"""Attention functions in transformers' signature."""
