"""Loggers whose package is missing."""

from __future__ import annotations

import sys

import pytest
from lightning_utilities.core.imports import module_available, package_available


@pytest.fixture
def without(monkeypatch):
    """A function that hides an installed package for the rest of the test."""

    def hide(name):
        monkeypatch.setitem(sys.modules, name, None)
        forget()

    def forget():
        module_available.cache_clear()
        package_available.cache_clear()

    yield hide
    monkeypatch.undo()
    forget()
