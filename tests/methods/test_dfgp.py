"""DFGP against its paper's equations, written out slowly."""

import pytest
import torch
from torch.testing import assert_close

from methods.parts.perturbation import computing_with, of_length
from tests.methods.cases import MethodCase, SlowGPM, train
from tests.tiny_nets import SingleHead, method


class SlowDFGP(SlowGPM):
    """Two gradients a step, image by image."""

    def gradients(self, t, images, labels):
        options, parameters = self.options, self.trained(t)
        partner = torch.rand(len(labels)).argsort()
        a = torch.full((len(labels),), options.dfgp_beta, dtype=images.dtype)
        mixing = torch.distributions.Beta(a, a).sample().requires_grad_()
        loss = self.loss(t, images, labels, partner, mixing, mixing.detach())
        uphill, *ascent = torch.autograd.grad(loss, [mixing, *parameters])
        mixing = (mixing.detach() + options.dfgp_rho * uphill / uphill.norm()).clip(0, 1)
        length = sum(g.square().sum() for g in ascent).sqrt()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, ascent, strict=True):
                p += options.dfgp_rho * g / length
        self.loss(t, images, labels, partner, mixing, mixing).backward()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)

    def loss(self, t, images, labels, partner, mixing, weights):
        mixed = [(1 - v) * x + v * images[j] for v, x, j in zip(mixing, images, partner, strict=True)]
        log_p = self.model(torch.stack(mixed), t).log_softmax(1)
        terms = [
            -(1 - v) * log_p[i, labels[i]] - v * log_p[i, labels[j]]
            for i, (v, j) in enumerate(zip(weights, partner, strict=True))
        ]
        plain = -self.model(images, t).log_softmax(1)[range(len(labels)), labels].mean()
        return plain + self.options.dfgp_gamma * sum(terms) / len(terms)


class TestDFGP(MethodCase):
    name, slow, changes = "dfgp", SlowDFGP, {"dfgp_gamma": 0.7, "dfgp_rho": 0.3, "dfgp_beta": 0.5}

    def test_without_mixing_and_ascent_is_gpm(self, kind):
        dfgp, gpm = self.make(kind, dfgp_gamma=0.0, dfgp_rho=0.0), method(kind.model(), "gpm")
        for t in range(3):
            for learner in (dfgp, gpm):
                train(learner, t, kind.task(t))
        assert_close(dfgp.model.state_dict(), gpm.model.state_dict())


def test_parameters_come_back_where_they_were():
    model = SingleHead()
    parameters = list(model.parameters())
    model.tied = model.fc2
    with pytest.raises(ValueError, match="stop"), computing_with(model, {parameters[1]: 2 * parameters[1]}):
        assert model.fc1.weight is parameters[0]
        assert_close(model.tied.weight, 2 * parameters[1])
        raise ValueError("stop")
    assert [model.fc1.weight, model.fc2.weight] == parameters
    a, b = of_length([torch.tensor([3.0]), None, torch.tensor([0.0, 4.0])], 0.5)[::2]
    assert (a.item(), *b.tolist()) == pytest.approx((0.3, 0.0, 0.4))
    assert of_length([torch.zeros(2)], 0.5)[0].tolist() == [0.0, 0.0]
