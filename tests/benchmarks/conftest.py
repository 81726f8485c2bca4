"""The package `benchmarks`, which is not installed: pytest's `pythonpath` finds it in the repository's root."""

import importlib
import pkgutil
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def benchmarks() -> ModuleType:
    """The package with all its modules."""
    package = importlib.import_module("benchmarks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"benchmarks.{module.name}")
    return package
