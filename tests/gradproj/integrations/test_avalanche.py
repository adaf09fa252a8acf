"""The memory in Avalanche's strategies."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from gradproj import GradientProjectionMemory, InputError
from tests.gradproj.integrations.small import D, assert_kept, assert_open, data, outputs

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
    pytest.importorskip("avalanche", reason="Avalanche is not installed")
    from avalanche.benchmarks import benchmark_from_datasets, split_online_stream
    from avalanche.benchmarks.utils import as_taskaware_classification_dataset, make_tensor_classification_dataset
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
    from avalanche.models import IncrementalClassifier, MTSimpleMLP, MultiHeadClassifier, MultiTaskModule
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from gradproj.integrations.avalanche import GradientProjectionPlugin, growing
print(benchmark_from_datasets, split_online_stream, as_taskaware_classification_dataset, make_tensor_classification_dataset)
