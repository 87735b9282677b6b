from tests.checkpoint.two_ranks import two_saved

__all__ = ["two_saved"]
