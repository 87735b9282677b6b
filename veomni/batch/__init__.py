"""What a loader yields: micro-batches, the rules of their fields, and how ranks share their rows."""
