"""Weights: initialized, streamed in, materialized per shard, gathered and exported."""
