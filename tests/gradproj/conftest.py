"""Every test begins with the same random numbers, in whatever order they run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
