"""Multimodal data: media read and made into a model's inputs as its processor does, documents into packed batches."""
