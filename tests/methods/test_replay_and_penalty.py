"""EWC, A-GEM and ER against their papers' equations, written out slowly."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch.nn import functional as F
from torch.testing import assert_close

from engine.task import Split
from methods.parts.replay import Reservoir, mixed_loss
from tests import tiny
from tests.tiny_nets import Residual, SingleHead, gradients, learn, method, picture_task

# EWC


def exact_fisher(model, images):
    """Mean over images of Σ_y p(y | x) (∂ log p(y | x) / ∂θ)², one image and label at a time."""
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image in images:
        p = model(image[None]).softmax(1)[0].detach()
        for y in range(tiny.N_CLASSES):
            score = torch.autograd.grad(model(image[None]).log_softmax(1)[0, y], list(model.parameters()))
            for total, s in zip(fisher.values(), score, strict=True):
                total += p[y] * s**2 / len(images)
    return fisher


def test_ewc_estimates_the_fisher_diagonal():
    model = SingleHead()
    with torch.no_grad():  # an image that is hard to tell counts much more than another
        model.fc2.weight *= 3
    images, labels = tiny.task(0).train
    train = Split(images.repeat(400, 1), labels.repeat(400))  # 187 batches: 10 % of noise a weight
    found, expected = method(model, "ewc").fisher_diagonal(0, train), exact_fisher(model, images)
    for name, value in expected.items():
        assert found[name].sum() == pytest.approx(value.sum().item(), rel=0.1)
        assert_close(found[name], value, rtol=0.5, atol=1e-3 * value.max().item())


def test_ewc_gradient_is_that_of_the_summed_fisher_around_the_last_weights(monkeypatch):
    model = tiny.Network()
    ewc = method(model, "ewc", ewc_lambda=7.0)
    generator = torch.Generator().manual_seed(0)
    past = []
    for t in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=generator, dtype=p.dtype)
        fisher = {name: torch.rand(p.shape, generator=generator, dtype=p.dtype) for name, p in ewc.shared.items()}
        fisher["fc1.weight"][4] = 0.0  # no stiffness at all here
        past.append((fisher, {name: p.detach().clone() for name, p in ewc.shared.items()}))
        monkeypatch.setattr(ewc, "fisher_diagonal", lambda *_, fisher=fisher: fisher)
        ewc.after_task(t, tiny.task(t))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)

    images, labels = tiny.task(3).train
    model.eval()
    last = past[-1][1]
    penalty = 7.0 / 2 * sum((f[n] * (p - last[n]) ** 2).sum() for f, _ in past for n, p in ewc.shared.items())
    (F.cross_entropy(model(images, 1), labels) + penalty).backward()
    expected = gradients(model)
    for name in ewc.shared:  # the implicit step of methods/ewc.py
        expected[name] /= 1 + 0.05 * 7.0 * sum(f[name] for f, _ in past)
    model.zero_grad()
    ewc.backward(images, labels, 1)
    assert_close(gradients(model), expected)
    assert not any(name.startswith("heads") for name in ewc.fisher)
    assert ewc.memory_floats() == 2 * sum(p.numel() for p in ewc.shared.values())


def test_ewc_step_is_the_minimum_of_the_linearised_loss_and_stable():
    model = SingleHead()
    ewc = method(model, "ewc", ewc_lambda=1e6, lr=0.1)
    learn(ewc, 0)
    for _ in range(20):
        learn(ewc, 1, steps=1)
    stiff = ewc.fisher["fc2.weight"] > 1e-3
    assert stiff.any()
    assert_close(model.fc2.weight[stiff], ewc.center["fc2.weight"][stiff], atol=1e-2, rtol=0)


# Episodic memory


def test_reservoir_is_uniform():
    n_tasks, per_task, size, trials = 3, 40, 20, 600
    counts = np.zeros(n_tasks * per_task)
    for seed in range(trials):
        reservoir, random = Reservoir(), torch.Generator().manual_seed(seed)
        for t in range(n_tasks):
            number = torch.arange(t * per_task, (t + 1) * per_task)
            reservoir = reservoir.offer(size, Split(number[:, None].double(), number), t, random)
        assert len(reservoir) == len(set(reservoir.labels.tolist())) == size
        assert (reservoir.images[:, 0] == reservoir.labels).all()
        assert (reservoir.tasks == reservoir.labels // per_task).all()
        counts[reservoir.labels.numpy()] += 1
    p = size / len(counts)
    # Without replacement, counts scatter by trials · p (1 - p), with n - 1 of n degrees of freedom.
    statistic = np.sum((counts - trials * p) ** 2) / (trials * p * (1 - p)) * (len(counts) - 1) / len(counts)
    assert chi2.ppf(0.001, len(counts) - 1) < statistic < chi2.isf(0.001, len(counts) - 1)


def test_reservoir_keeps_everything_until_it_is_full():
    reservoir = Reservoir()
    for t in range(2):
        reservoir = reservoir.offer(100, tiny.task(t).train, t, torch.Generator().manual_seed(t))
    expected = torch.cat([tiny.task(t).train.images for t in range(2)])
    assert_close(reservoir.images.sort(dim=0).values, expected.sort(dim=0).values)
    assert reservoir.tasks.tolist() == [0] * 30 + [1] * 30


def test_memory_has_the_size_of_the_largest_gpm():
    er = method(SingleHead(), "er")
    er.after_task(0, tiny.task(0, n_train=300))
    assert len(er.reservoir) == round((12**2 + 7**2) / 12) == 16
    assert er.memory_floats() == 16 * 12
    er = method(tiny.Network(), "er", memory_images=21)
    er.after_task(0, tiny.task(0))
    er.after_task(1, tiny.task(1))
    assert len(er.reservoir) == 21


def test_replays_use_the_head_of_each_image():
    model = Residual().eval()
    parts = [picture_task(t).train for t in range(3)]
    images = torch.cat([part.images[:4] for part in parts])
    labels = torch.cat([part.labels[:4] for part in parts])
    tasks = torch.arange(3).repeat_interleave(4)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    expected = sum(F.cross_entropy(model(part.images[:4], j), part.labels[:4]) for j, part in enumerate(parts)) / 3
    found = mixed_loss(method(model, "er"), images[shuffle], labels[shuffle], tasks[shuffle])
    # Within a task the order of images changes BatchNorm's sums by rounding only.
    assert_close(found, expected)


def test_replay_of_networks_with_batch_statistics_is_of_one_task():
    mixed, pure = method(SingleHead(), "er", memory_images=40), method(tiny.Network(), "er", memory_images=40)
    for er, expected in ((mixed, {1, 2}), (pure, {1})):
        for t, n_train in enumerate((9, 90)):  # a task's chance is its share of the memory, not one in two
            er.after_task(t, tiny.task(t, n_train))
        drawn = [er.reservoir.draw(4, er is pure, er.generator) for _ in range(200)]
        assert {len(tasks.unique()) for _, _, tasks in drawn} <= expected
        share = torch.cat([tasks for _, _, tasks in drawn]).bincount() / (200 * 4)
        assert 0 < share[0] < 0.2
        assert_close(share, er.reservoir.tasks.bincount() / 40, atol=0.08, rtol=0)
    seen = []
    pure.model.register_forward_pre_hook(lambda _, args: seen.append(args))
    pure.replayed_loss()
    assert len(seen) == 1
    assert len(seen[0][0]) == 8


def test_a_task_with_one_image_in_memory_can_be_replayed():
    er = method(tiny.Network(), "er", memory_images=1)
    er.after_task(0, tiny.task(0))
    loss, n = er.replayed_loss()  # BatchNorm1d would refuse a batch of one
    assert loss.isfinite()
    assert n == 2


def test_er_loss_is_the_mean_over_both_batches():
    er = method(SingleHead(), "er", replay_batch=20)
    images, labels = tiny.task(1).train
    assert_close(er.loss(images, labels, 0), F.cross_entropy(er.model(images), labels))
    er.after_task(0, tiny.task(0, n_train=100))
    state = er.generator.get_state()
    m_images, m_labels, _ = er.reservoir.draw(20, False, er.generator)
    er.generator.set_state(state)
    both = torch.cat([images, m_images]), torch.cat([labels, m_labels])
    assert_close(er.loss(images, labels, 1), F.cross_entropy(er.model(both[0]), both[1]))


@pytest.mark.parametrize("conflict", [True, False])
def test_a_gem_projects_where_gradients_conflict(conflict):
    model = SingleHead()
    a_gem = method(model, "a_gem", memory_images=30, replay_batch=30)
    task = tiny.task(0)
    memory = Split(task.train.images, (task.train.labels + conflict) % tiny.N_CLASSES)
    a_gem.backward(*task.train, 1)  # nothing remembered: nothing to do
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    plain = torch.autograd.grad(F.cross_entropy(model(task.train.images), task.train.labels), list(model.parameters()))
    assert_close(g, torch.cat([part.flatten() for part in plain]), atol=0, rtol=0)
    a_gem.reservoir = Reservoir().offer(30, memory, 0, torch.Generator())
    loss = F.cross_entropy(model(memory.images), memory.labels)
    g_ref = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
    assert (g @ g_ref < 0) == conflict
    model.zero_grad()
    a_gem.backward(*task.train, 1)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    if conflict:
        assert_close(found, g - (g @ g_ref) / (g_ref @ g_ref) * g_ref)
        assert abs(found @ g_ref) < 1e-12 * g.norm() * g_ref.norm()
    else:
        assert_close(found, g, atol=0, rtol=0)


def test_a_gem_includes_the_heads_of_earlier_tasks():
    model = tiny.Network().eval()
    a_gem = method(model, "a_gem", memory_images=30, replay_batch=30)
    images, labels = tiny.task(0).train
    wrong = Split(images, (labels + 1) % tiny.N_CLASSES)
    a_gem.reservoir = Reservoir().offer(30, wrong, 0, torch.Generator())
    model.heads[1].load_state_dict(model.heads[0].state_dict())
    a_gem.backward(images, labels, 1)
    assert {id(p) for p in a_gem.parameters(1)} == {id(p) for n, p in model.named_parameters() if "heads.2" not in n}
    assert model.heads[0].weight.grad.norm() > 0
    assert model.heads[2].weight.grad is None


@pytest.mark.parametrize("name", ["a_gem", "er", "fs_dgpm"])
def test_replayed_images_pass_in_the_precision_of_the_run(name):
    learner = method(SingleHead().float(), name, amp="bf16")
    images, labels = tiny.task(0).train
    split = Split(images.float(), labels)
    learner.reservoir = learner.reservoir.offer(9, split, 0, torch.Generator().manual_seed(0))
    seen = []
    learner.model.fc2.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with learner.learning(1, tiny.task(1)):
        learner.backward(*split, 1)
    assert len(seen) > 1 and set(seen) == {torch.bfloat16}


def test_ewc_shortens_the_step_by_the_rate_at_hand():
    """The implicit step θ' = θ - lr (g + λ F (θ' - θ*)), also after the schedule has divided lr."""
    ewc = method(SingleHead(), "ewc", ewc_lambda=50.0)
    ewc.after_task(0, tiny.task(0))
    ewc.lr = ewc.options.lr / 8
    with torch.no_grad():
        ewc.model.fc1.weight.add_(0.1)
    before = ewc.model.fc1.weight.detach().clone()
    images, labels = tiny.task(1).train
    (g,) = torch.autograd.grad(F.cross_entropy(ewc.model(images, 1), labels), [ewc.model.fc1.weight])
    ewc.backward(images, labels, 1)
    after = before - ewc.lr * ewc.model.fc1.weight.grad
    pull = 50.0 * ewc.fisher["fc1.weight"] * (after - ewc.center["fc1.weight"])
    assert_close(after, before - ewc.lr * (g + pull))


def test_where_batchnorm_is_each_tasks_images_pass_apart_also_under_one_head():
    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 4)
            self.bn = torch.nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x, t):
            return self.bn(self.fc(x))

    model = Normalised()
    learner = method(model, "er")
    images, labels, tasks = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 1, 0, 1, 1, 0])
    apart = [F.cross_entropy(model(images[tasks == t], t), labels[tasks == t], reduction="sum") for t in (0, 1)]
    assert_close(mixed_loss(learner, images, labels, tasks), sum(apart) / 6)
