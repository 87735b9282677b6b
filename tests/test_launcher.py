"""Arguments of the launcher are checked where they are given."""

import re

import pytest

from veomni.errors import ConfigError, LayoutError
from veomni.launcher import Launcher
from veomni.strategies import DDP, Compile

BAD_ARGUMENTS = {
    "Launcher.devices is 0": {"devices": 0},
    "Launcher.seed is -1": {"seed": -1},
    "Launcher.timeout_seconds is '9'": {"timeout_seconds": "9"},
    "no precision is called 16": {"precision": 16},
    "no accelerator is called 0": {"accelerator": 0},
    "'ddp' is given for a strategy": {"strategy": ["ddp"]},
    "2 is given for a strategy": {"strategy": 2},
    "strategy ulysses does not hold parameters": {"strategy": "ulysses"},
    "strategy compile is given twice": {"strategy": [DDP(), Compile(), Compile()]},
}


@pytest.mark.parametrize("problem", BAD_ARGUMENTS)
def test_arguments_of_the_launcher_are_checked(problem):
    with pytest.raises((ConfigError, LayoutError), match=re.escape(problem)):
        Launcher(**BAD_ARGUMENTS[problem])
