"""Strategies that split the rows of a batch over ranks."""
