"""Cross-entropy over the vocabulary."""
