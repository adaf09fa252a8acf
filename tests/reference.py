"""The paper's equations as written, in NumPy: slow, obvious, and independent of gradproj/.

Full SVDs, dense d x d projectors and Python loops over patches, which the tests compare gradproj/ with. (The speed
benchmark has a plain form of its own, benchmarks/plain.py: this one is too slow to time.) All numbers are float64.

Letters: d size of a layer's input, n samples or patches, k basis columns, R (d, n) representation matrix,
M (d, k) orthonormal basis, G (o, d) gradient of a layer's weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Energy below this fraction of the whole is rounding: it neither counts as missing nor deserves a direction.
ROUNDING = 1e-13


def energy(matrix: ArrayLike) -> float:
    """The squared Frobenius norm, ‖matrix‖²."""
    return float(np.sum(np.square(np.asarray(matrix, dtype=np.float64))))


def extend_basis(M: ArrayLike, R: ArrayLike, eps: float, rank_rule: str = "paper") -> Array:
    """The basis M (d, k) with the directions that the samples R (d, n) need appended (Eqs. 5, 8 and 9)."""
    M, R = np.asarray(M, dtype=np.float64), np.asarray(R, dtype=np.float64)
    d, k = M.shape
    residual = R - M @ M.T @ R  # Eq. 8; R itself while M is empty
    U, S, _ = np.linalg.svd(residual, full_matrices=True)  # U (d, d)
    captured, r = energy(M @ M.T @ R), 0
    while captured < eps * energy(R) - ROUNDING * energy(R) and k + r < d:  # Eq. 9; Eq. 5 while M is empty
        captured, r = captured + float(S[r]) ** 2, r + 1
    if rank_rule == "released":
        r = max(r - 1, 0)
    return np.concatenate([M, U[:, :r]], axis=1)


def project(G: ArrayLike, M: ArrayLike) -> Array:
    """The gradient G (o, d) without its part in the span of M (d, k): G - G M Mᵀ (Eqs. 6 and 7)."""
    G, M = np.asarray(G, dtype=np.float64), np.asarray(M, dtype=np.float64)
    return G @ (np.eye(len(M)) - M @ M.T)


def numerical_rank(R: ArrayLike) -> int:
    """How many singular values are more than rounding."""
    S = np.linalg.svd(np.asarray(R, dtype=np.float64), compute_uv=False)
    return int(np.sum(np.square(S) > ROUNDING * energy(R)))


def span_distance(A: ArrayLike, B: ArrayLike) -> float:
    """‖A Aᵀ - B Bᵀ‖₂ of two orthonormal bases: the sine of the largest principal angle; 1.0 where ranks differ."""
    A, B = np.asarray(A, dtype=np.float64), np.asarray(B, dtype=np.float64)
    if A.shape != B.shape:
        return 1.0
    return float(np.linalg.norm(A @ A.T - B @ B.T, ord=2))


def conv_patches(
    x: ArrayLike,
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Every patch that a convolution multiplies with its kernel, one a column.

    Args:
        x: (batch, channels, *size), one, two or three sizes.
        kernel: one number an axis.
        stride, dilation: one number, or one an axis.
        padding: entries on both sides: one number, one an axis, "valid" or "same".
        groups: the channels are cut into so many parts.
        padding_mode: zeros, reflect, replicate or circular.
    Returns:
        (groups, d, batch · positions), d = channels / groups · Π kernel; images outside, positions row by row.
    """
    x = np.asarray(x, dtype=np.float64)
    dims = x.ndim - 2
    stride, dilation = _one_an_axis(stride, dims), _one_an_axis(dilation, dims)
    x = _pad(x, kernel, padding, dilation, padding_mode)
    n_positions = [
        (size - step * (length - 1) - 1) // jump + 1
        for size, length, jump, step in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    channels = x.shape[1] // groups
    parts = []
    for group in range(groups):
        columns = []
        for image in x[:, group * channels : (group + 1) * channels]:
            for position in itertools.product(*map(range, n_positions)):
                column = []
                for channel in image:
                    for offset in itertools.product(*map(range, kernel)):
                        place = tuple(np.multiply(position, stride) + np.multiply(offset, dilation))
                        column.append(channel[place])
                columns.append(column)
        parts.append(np.array(columns).T)  # (d, batch · positions)
    return np.stack(parts)


def convolution(weight: ArrayLike, patches: ArrayLike, out_shape: Sequence[int]) -> Array:
    """The output of a convolution: each group's kernels times its patches.

    Args:
        weight: (o, channels / groups, *kernel).
        patches: (groups, d, batch · positions), from `conv_patches`.
        out_shape: (batch, o, *positions).
    """
    patches = np.asarray(patches, dtype=np.float64)
    kernels = np.asarray(weight, dtype=np.float64).reshape(len(patches), -1, patches.shape[1])  # (groups, o', d)
    rows = np.concatenate([W @ P for W, P in zip(kernels, patches, strict=True)])  # (o, batch · positions)
    return np.moveaxis(rows.reshape(len(rows), out_shape[0], *out_shape[2:]), 0, 1)


def local_response_norm(x: ArrayLike, size: int, alpha: float, beta: float, k: float) -> Array:
    """x / (k + α/size Σ x²)^β, the sum over `size` channels around each (AlexNet's normalisation, as in torch)."""
    x = np.asarray(x, dtype=np.float64)
    out = np.empty_like(x)
    for channel in range(x.shape[1]):
        first, last = max(channel - size // 2, 0), channel + (size - 1) // 2
        squares = np.square(x[:, first : last + 1]).sum(axis=1)
        out[:, channel] = x[:, channel] / (k + alpha / size * squares) ** beta
    return out


def average_accuracy(accuracy: Sequence[Sequence[float | None]]) -> float:
    """ACC: the mean of the last row."""
    return float(np.mean([float(value) for value in accuracy[-1]]))


def backward_transfer(accuracy: Sequence[Sequence[float | None]]) -> float:
    """BWT: the mean over the T - 1 earlier tasks of last row minus diagonal."""
    n_tasks = len(accuracy)
    return sum(accuracy[n_tasks - 1][j] - accuracy[j][j] for j in range(n_tasks - 1)) / (n_tasks - 1)


def _one_an_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _pad(x: Array, kernel: Sequence[int], padding: int | str | Sequence[int], dilation: Sequence[int], mode: str):
    if padding == "same":  # the odd entry goes behind
        totals = [step * (length - 1) for step, length in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in _one_an_axis(0 if padding == "valid" else padding, len(kernel))]
    name = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    return np.pad(x, [(0, 0), (0, 0), *sides], mode=name)
