"""What tests of faults start from: two ranks with two saved steps, and real programs."""

from tests.faults.two_ranks import two_saved
from tests.launch.conftest import start

__all__ = ["start", "two_saved"]
