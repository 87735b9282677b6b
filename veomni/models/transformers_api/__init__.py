"""Everything transformers does not export, by subject."""
