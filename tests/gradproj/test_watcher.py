"""What a memory goes on watching after a first warning, and when steps are compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from gradproj import GradientProjectionMemory
from tests.gradproj.learned import NEW, OLD, D, mlp, remembering


class Counting(nn.Module):
    """Counts its calls in a buffer, which is warned of and harms nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def train(model, memory, steps=4, clamp=False):
    """What is said while a model learns something new, its weights perhaps clamped by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with memory.protect(optimizer):
            for _ in range(steps):
                optimizer.zero_grad()
                model(NEW).square().mean().backward()
                optimizer.step()
                if clamp:
                    with torch.no_grad():
                        for p in model.parameters():
                            p.clamp_(-0.2, 0.2)
    return [str(w.message) for w in caught]


def test_one_warning_does_not_hide_another():
    model = Counting()
    memory = GradientProjectionMemory(model)
    memory.update(model, [OLD], threshold=0.9)
    said = train(model, memory, clamp=True)
    assert sum("calls is changed by the forward pass itself" in text for text in said) == 1
    assert not any("calls has changed" in text for text in said), "the same thing twice"
    for layer in ("net.0", "net.2", "net.4"):
        assert sum(f"of the movement of {layer} is in remembered directions" in text for text in said) == 1


def test_steps_since_the_last_update_are_counted():
    """Rounding explains more of a movement after more of them."""
    model = mlp()
    memory = remembering(model)
    before = memory.verify(model, OLD).explained
    train(model, memory, steps=300)
    assert memory.verify(model, OLD).explained > 3 * before
    memory.update(model, [NEW], threshold=0.9)
    assert memory.verify(model, OLD).explained < 2 * before


def test_a_later_task_is_watched_again():
    model = mlp()
    memory = GradientProjectionMemory(model)
    memory.update(model, [OLD], threshold=0.9)
    assert any("since task 1" in text for text in train(model, memory, clamp=True))
    memory.update(model, [NEW], threshold=0.9)
    assert any("since task 2" in text for text in train(model, memory, clamp=True))


@pytest.mark.parametrize(("how", "name"), [("unfrozen", "4"), ("added", "5")])
def test_what_begins_to_learn_within_protection_is_named(how, name):
    model = mlp()
    model[4].requires_grad_(False)
    memory = remembering(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = f"^not protected, .* through them: {name}.weight, {name}.bias;"
    with pytest.warns(UserWarning, match=said), memory.protect(optimizer):
        for step in range(3):
            if step == 1 and how == "unfrozen":
                model[4].requires_grad_(True)
            if step == 1 and how == "added":
                model.append(nn.Linear(4, 4))
                optimizer.add_param_group({"params": list(model[5].parameters())})
            optimizer.zero_grad()
            model(NEW).square().mean().backward()
            optimizer.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inside torch's compiler
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_compiled_step(make):
    model = mlp()
    memory = remembering(model)
    optimizer = make(model.parameters(), lr=0.05)
    with memory.protect(optimizer):
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            optimizer.zero_grad()
            model(NEW).square().mean().backward()
            step()
    assert memory.verify(model, OLD).holds


class HeadsFirst(nn.Module):
    """An attention that more heads come before."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(D, 2) for _ in range(n_heads))
        self.attention = nn.MultiheadAttention(D, 1, batch_first=True)

    def forward(self, x):
        return self.heads[0](self.attention(x, x, x)[0])


def test_a_memory_goes_on_in_a_network_with_more_heads():
    """Where weights are applied is saved by name."""
    old, new = torch.randn(2, 3, D), torch.randn(2, 3, D)
    first, longer = HeadsFirst(1), HeadsFirst(2)
    memory, continued = (GradientProjectionMemory(model, exclude=["heads"]) for model in (first, longer))
    memory.update(first, [old], threshold=0.9)
    continued.load_state_dict(memory.state_dict())
    before = {name: value.clone() for name, value in longer.state_dict().items()}
    optimizer = torch.optim.SGD(longer.parameters(), lr=0.1)
    with continued.protect(optimizer):
        longer(new).square().mean().backward()
        optimizer.step()
    assert max(leak or 0 for leak in continued.leak(before).values()) < 1e-4
