"""One record per model family, read by the model side and the data side."""
