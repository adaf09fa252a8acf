"""Tests of kinds of layers run for every variant that the class lists."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(metafunc.cls.variants))
