"""The only writer on a model: ordered passes around its forward, and patches that are undone in reverse."""
