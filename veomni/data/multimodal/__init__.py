"""Multimodal data: what a processor makes of a conversation becomes packed micro-batches."""
