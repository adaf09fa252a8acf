"""SGP against its paper's equations, written out slowly."""

import torch
from torch.testing import assert_close

from tests.methods.cases import KINDS, MethodCase, SlowGPM, train
from tests.tiny_nets import SingleHead, method


class SlowSGP(SlowGPM):
    """Scaled gradient projection, one direction at a time."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.importance = {name: torch.zeros(0) for name in self.layers}

    def removed(self, name):
        M = self.bases[name]
        return M @ torch.diag(self.importance[name]).to(M) @ M.T

    def remember(self, t, inputs):
        super().remember(t, inputs)
        alpha = self.options.sgp_alpha
        for name, R in inputs.items():
            M, old = self.bases[name], self.importance[name]
            s = [(R.T @ m).norm() for m in M.T]
            added = [(alpha + 1) * x / (alpha * x + max(s)) for x in s]
            self.importance[name] = torch.stack(
                [min(old[i] + a, torch.ones(())) if i < len(old) else a for i, a in enumerate(added)]
            )

    def floats(self):
        return super().floats() + sum(len(importance) for importance in self.importance.values())


class TestSGP(MethodCase):
    name, slow, changes = "sgp", SlowSGP, {"sgp_alpha": 2.0}


def test_sgp_that_holds_everything_firmly_is_gpm():
    sgp, gpm = method(SingleHead(), "sgp", sgp_alpha=1e12), method(SingleHead(), "gpm")
    for t in range(3):
        for learner in (sgp, gpm):
            train(learner, t, KINDS["one"].task(t))
    assert_close(sgp.model.state_dict(), gpm.model.state_dict())
    assert sgp.memory.columns == gpm.memory.columns


def test_sgp_knows_no_importance_of_a_layer_that_a_task_does_not_use():
    sgp = method(SingleHead(), "sgp")
    train(sgp, 0, KINDS["one"].task(0))
    with torch.no_grad():
        sgp.model.fc1.weight.zero_()  # fc2 sees zeros from now on
    before = sgp.importance["fc2"]
    sgp.after_task(1, KINDS["one"].task(1))
    assert_close(sgp.importance["fc2"], before, atol=0, rtol=0)
