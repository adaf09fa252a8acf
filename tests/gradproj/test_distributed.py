"""A memory shared by two processes is that of one process which has all their samples."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.distributed import alone
from gradproj.files import load_tensors
from tests.gradproj import distributed_cases as cases
from tests.gradproj.distributed_cases import SHARES, Parted, made, model, normalised, parted_samples, tokens, update
from tests.processes import run_group

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("group")
    for done in run_group("tests.gradproj.distributed_cases", folder):
        assert done.returncode == 0, done.stdout
    return tuple(load_tensors(folder / f"results-{rank}.pt") for rank in (0, 1))


def assert_same_subspaces(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """That bases span the same, of embeddings hold the same rows."""
    assert found.keys() == expected.keys()
    for key, basis in expected.items():
        if basis.ndim == 1:
            assert_close(found[key], basis)
        else:
            assert found[key].shape == basis.shape, key
            assert_close(found[key] @ found[key].T, basis @ basis.T, atol=tolerance, rtol=0, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "several_passes", "one_without_batches"])
def test_bases_are_those_of_one_process(both, name):
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    expected = update(made(dtype, exact=name in ("float32", "bfloat16")), lambda task: tokens(task).split(9))
    memory = made()
    gathered = memory.gather(memory.model, [tokens(0)])
    forms = {part.gram is None for part in gathered.values() if hasattr(part, "gram")}
    assert forms == {True, False}  # both columns and R Rᵀ are summed
    for found in both:
        # Samples in other batches: bfloat16 rounds a product once, whatever the batch.
        assert_same_subspaces(found[name], expected, 1e-5)


def test_both_processes_have_the_same_bits(both):
    for name in ("float32", "bfloat16", "several_passes", "one_without_batches"):
        assert_close(both[0][name], both[1][name], atol=0, rtol=0)


def test_a_process_without_batches_protects_what_it_never_saw_applied(both):
    assert both[0]["hosts_of_one_without_batches"] < 1e-5
    assert both[1]["hosts_of_one_without_batches"] < 1e-5


def test_no_batches_at_all_is_said_in_each(both):
    for found in both:
        assert "there are no batches" in found["none_with_batches"]


def test_an_error_in_one_process_ends_all(both):
    assert both[0]["an_error_in_one"].startswith("InputError: process 1 cannot go on (OSError: the disk is gone)")
    assert both[1]["an_error_in_one"] == "OSError: the disk is gone"


def test_layers_that_run_in_some_processes_or_share_inputs_in_some(both):
    """a runs everywhere; b is given the same as a in one process only; c runs in one."""
    expected = {}
    for name in "abc":
        memory = GradientProjectionMemory(model(Parted), include=name, exact=True)
        memory.update(memory.model, list(parted_samples().split(SHARES)), 0.8)
        expected |= memory.bases
    assert not torch.allclose(expected["a"], expected["b"])
    for found in both:
        assert_same_subspaces(found["layers_that_run_in_one"], expected, 1e-6)


def test_columns_that_are_kept_are_all_processes(both):
    expected = torch.cat([parted_samples(), torch.ones(30, 1)], dim=1).T
    assert_close(both[0]["all_columns"], expected)
    assert_close(both[1]["all_columns"], expected)


def test_a_wrapper_that_synchronises_buffers_does_not_wait(both):
    inner = model(normalised)
    memory = GradientProjectionMemory(inner, exact=True)
    memory.update(inner, [torch.linspace(-1, 1, 150).view(30, 5).sin()], 0.9)
    for found in both:
        assert found["buffers"].pop("synchronises")  # as it was before
        assert_same_subspaces(found["buffers"], memory.bases, 1e-5)


def test_processes_with_models_of_their_own(both):
    for rank, found in enumerate(both):
        assert "the processes' models differ" in found["other_models"]
        assert found["other_models_alone"] == rank + 1


@pytest.mark.parametrize("of", ["wrapped", "inner"])
def test_protection_holds(both, of):
    first, second = (found["protected"] for found in both)
    assert first[f"{of} holds"] == [True, True]
    assert max(first[f"{of} moved"]) < 1e-5
    for found in (first, second):
        assert found[f"{of} losses"][-1] < 0.7 * found[f"{of} losses"][0]
    assert_close(first[f"{of} weights"], second[f"{of} weights"], atol=0, rtol=0)


def test_gradients_are_those_of_one_process(both):
    inner = model(lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)))
    data = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(6))
    memory = GradientProjectionMemory(inner)
    memory.update(inner, [data[0]], 0.8)
    with memory.protect():
        F.mse_loss(inner(data[1]), torch.ones(12, 3)).backward()
    for found in both:
        assert_close(found["gradients"], {name: p.grad for name, p in inner.named_parameters()}, atol=1e-6, rtol=1e-4)


def test_sharded_models_are_refused(both):
    for found in both:
        assert found["sharded"].keys() == {
            *("fully_shard", "FullyShardedDataParallel", "fully_shard before update", "fully_shard before protect")
        }
        assert all("holds only a part" in line for line in found["sharded"].values())


def test_alone_is_undone_and_one_process_needs_no_group():
    with alone(), alone():
        memory = made()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            memory.update(memory.model, [tokens(0)], 0.9)
    assert sum(memory.columns.values())
    assert cases.distributed.is_initialized() is False
