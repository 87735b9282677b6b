"""What one examination of a model finds; strategies name what they require."""
