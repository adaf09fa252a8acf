"""OWM and OGD against their papers' equations, written out slowly."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from engine.task import Split
from gradproj.errors import InputError
from methods.ogd import pseudo_inverse
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
        assert_close(owm.matrix(name).numpy(), P)

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


class Biased(torch.nn.Module):
    """A chain of Linear layers, the first with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fc1, self.fc2 = torch.nn.Linear(tiny.N_INPUTS, 7), torch.nn.Linear(7, tiny.N_CLASSES, bias=False)
        self.double()

    def forward(self, images, task=0):
        return self.fc2(torch.tanh(self.fc1(images)))


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def logit_gradients(model, task):
    """∇ f_y(x) of every training image, as rows, by one backward pass for each."""
    rows = [
        torch.autograd.grad(model(x[None])[0, y], list(model.parameters())) for x, y in zip(*task.train, strict=True)
    ]
    return torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])


@pytest.mark.parametrize("network", [SingleHead, Biased])
def test_ogd_gradients_are_orthogonal_to_old_logits(network):
    model = network()
    ogd = method(model, "ogd", ogd_samples=30)  # all images
    learn(ogd, 0)
    stored = [logit_gradients(model, tiny.task(0))]
    learn(ogd, 1)
    stored = torch.cat([*stored, logit_gradients(model, tiny.task(1))])
    ogd.loss(*tiny.task(2).train, 2).backward()
    before = flat_gradient(model)
    ogd.project()
    _, values, directions = torch.linalg.svd(stored, full_matrices=False)
    S = directions[values > 1e-9 * values[0]]  # an orthonormal basis of their span, of rows
    after = before - (before @ S.T) @ S
    assert 0.05 < after.norm() / before.norm() < 0.95
    assert_close(flat_gradient(model), after, rtol=1e-8, atol=1e-10)
    sizes = sum(sum(p.shape) if p.ndim == 2 else 1 for p in model.parameters())  # of an image: o + d for each layer
    assert ogd.memory_floats() == 60 * sizes


def test_ogd_stores_random_images_of_each_task():
    model = SingleHead()
    ogd = method(model, "ogd", ogd_samples=5)
    learn(ogd, 0)
    images = tiny.task(0).train.images
    matches = (ogd.factors["fc1"].inputs[:, None] == images[None]).all(2)
    assert matches.sum(1).tolist() == [1] * 5
    assert matches[:, :5].sum() < 5  # not the first ones
    learn(ogd, 1)
    assert [len(part) for part in ogd.factors["fc2"]] == [10, 10]


def test_ogd_leaves_no_trace_of_stored_gradients_in_float32():
    model = SingleHead().float()
    ogd = method(model, "ogd", ogd_samples=30)
    task = tiny.task(0, dtype=torch.float32)
    twice = Split(*(torch.cat([part, part + 1e-6 if part.is_floating_point() else part]) for part in task.train))
    ogd.factors = ogd.logit_gradients(*twice, 0)  # hardly more directions than images: most eigenvalues are noise
    ogd.inverse = pseudo_inverse(ogd.factors)
    stored = logit_gradients(model, task)
    ogd.loss(*tiny.task(1, dtype=torch.float32).train, 1).backward()
    before = flat_gradient(model)
    ogd.project()
    assert (stored @ flat_gradient(model)).abs().max() < 1e-4 * stored.norm(dim=1).max() * before.norm()


class Convolutional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv1d(1, 2, 3), torch.nn.Linear(2, tiny.N_CLASSES)


class Shared(Biased):
    def forward(self, images, task=0):
        return self.fc2(self.fc1(images) + self.fc1(images.flip(1)))


def test_ogd_refuses_networks_whose_gradients_are_not_outer_products():
    with pytest.raises(
        InputError, match=r"^ogd needs a network of Linear layers only; conv.weight is another layer's$"
    ):
        method(Convolutional(), "ogd")
    ogd = method(Shared(), "ogd")
    with pytest.raises(InputError, match=r"^ogd needs layers that see one vector an image, once; fc1 is another kind$"):
        ogd.after_task(0, tiny.task(0))


def test_ogd_refuses_heads():
    with pytest.raises(InputError, match="^ogd is for networks with one head .*; Network has a head for each task$"):
        method(tiny.Network(), "ogd")
