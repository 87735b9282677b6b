"""Loaders: indexed and streamed, with workers and exact resume."""
