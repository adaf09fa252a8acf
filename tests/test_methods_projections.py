"""OWM and OGD against their papers' equations, written out slowly."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gpm import InputError
from gpm.methods.ogd import orthonormal_rest
from tests import tiny
from tests.tiny_nets import Residual, SingleHead, gradients, learn, method, picture_task

# OWM


def sequential_projectors(model, layers, batches, alpha):
    """P by the paper's recursion, one mean input at a time."""
    projectors = {}
    inputs = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: inputs.__setitem__(name, args[0]))
        for name, module in layers.items()
    ]
    for batch in batches:
        with torch.no_grad():
            model(batch, 0)
        for name, module in layers.items():
            mean = inputs[name].mean(0).numpy()
            if isinstance(module, torch.nn.Conv2d):
                pad, size = module.padding[0], module.kernel_size[0]
                mean = np.pad(mean, ((0, 0), (pad, pad), (pad, pad)))
                corners = range(mean.shape[1] - size + 1)
                means = [mean[:, i : i + size, j : j + size].ravel() for i in corners for j in corners]
            else:
                means = [mean]
            for x in means:
                x = np.append(x, 1.0) if module.bias is not None else x
                P = projectors.setdefault(name, np.eye(len(x)))
                k = P @ x / (alpha + x @ P @ x)
                projectors[name] = P - np.outer(k, x @ P)
    for handle in handles:
        handle.remove()
    return projectors


def test_owm_projector_is_that_of_the_recursion_and_meets_the_gradient():
    model, task = Residual(), picture_task(0)
    owm = method(model, "owm", owm_alpha=0.3, batch_size_train=24)
    owm.after_task(0, task)  # one batch, so its random order does not matter
    layers = {name: model.get_submodule(name) for name in ("stem", "conv1", "fc")}
    expected = sequential_projectors(model.eval(), layers, [task.train.images], alpha=0.3)
    for name, P in expected.items():
        assert_close(owm.projector(name).numpy(), P)

    images, labels = picture_task(1).train
    owm.loss(images, labels, 1).backward()
    plain = gradients(model)
    model.zero_grad()
    with owm.learning(1, picture_task(1)):
        assert not any(p is model.bn1.weight for p in owm.parameters(1))
        owm.loss(images, labels, 1).backward()
    assert all(p.requires_grad for p in model.parameters())
    found = gradients(model)
    assert_close(found["fc.weight"].numpy(), plain["fc.weight"].numpy() @ expected["fc"])
    assert_close(found["stem.weight"].flatten(1).numpy(), plain["stem.weight"].flatten(1).numpy() @ expected["stem"])
    rows = torch.cat([plain["conv1.weight"].flatten(1), plain["conv1.bias"][:, None]], dim=1).numpy()
    assert_close(found["conv1.bias"].numpy(), (rows @ expected["conv1"])[:, -1])
    assert_close(found["heads.1.weight"], plain["heads.1.weight"])
    assert owm.memory_floats() == 18**2 + 37**2 + 16**2


def test_owm_takes_one_mean_of_each_batch_and_adds_up_tasks():
    owm = method(SingleHead(), "owm", batch_size_train=8)
    owm.after_task(0, tiny.task(0))  # 30 images: four batches
    first = owm.gram["fc1"]
    assert torch.linalg.matrix_rank(first) == 4
    owm.after_task(1, tiny.task(1))
    assert torch.linalg.matrix_rank(owm.gram["fc1"] - first) == 4


# OGD


def test_ogd_gradients_are_orthogonal_to_old_logits():
    model = SingleHead()
    ogd = method(model, "ogd", ogd_samples=5)
    learn(ogd, 0)
    parameters = list(model.parameters())
    task = tiny.task(0)
    old = [  # of all images, of which the method stores five
        torch.cat([p.flatten() for p in torch.autograd.grad(model(x[None])[0, y], parameters)])
        for x, y in zip(*task.train, strict=True)
    ]
    assert_close(ogd.basis @ ogd.basis.T, torch.eye(5, dtype=torch.float64))
    stored = [g for g in old if (g - ogd.basis.T @ (ogd.basis @ g)).norm() < 1e-9 * g.norm()]
    assert len(stored) == 5
    ogd.loss(*tiny.task(1).train, 1).backward()
    before = torch.cat([p.grad.flatten() for p in parameters])
    ogd.after_backward(1)
    after = torch.cat([p.grad.flatten() for p in parameters])
    for g in stored:
        assert abs(g @ after) < 1e-12 * g.norm() * before.norm()
    S = torch.linalg.qr(torch.stack(stored, dim=1)).Q
    assert_close(after, before - S @ (S.T @ before))
    assert ogd.memory_floats() == 5 * sum(p.numel() for p in parameters)


def test_ogd_basis_grows_by_what_is_new():
    random = torch.Generator().manual_seed(0)
    a = torch.randn(4, 9, generator=random, dtype=torch.float64)
    basis = orthonormal_rest(a, a.new_empty(0, 9))
    mixed = torch.cat([a[:2] + a[2:], torch.randn(1, 9, generator=random, dtype=torch.float64), a[:1]])
    new = orthonormal_rest(torch.cat([mixed, mixed[2:3] * 3]), basis)
    assert new.shape == (1, 9)
    whole = torch.cat([basis, new])
    assert_close(whole @ whole.T, torch.eye(5, dtype=torch.float64))
    assert_close(mixed @ whole.T @ whole, mixed)


def test_ogd_refuses_heads():
    with pytest.raises(InputError, match="^ogd is for one head .*; Network has a head for each task$"):
        method(tiny.Network(), "ogd")
