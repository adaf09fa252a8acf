"""How a model says which of its modules belong to single tasks."""

import pytest
from torch import nn

from engine.heads import task_modules
from gradproj.errors import InputError


class Model(nn.Module):
    def __init__(self, heads=None):
        super().__init__()
        self.body = nn.Linear(2, 2)
        if heads is not None:
            self.heads = heads


def linears(n):
    return [nn.Linear(2, i + 1) for i in range(n)]


def test_a_list_in_its_order():
    heads = linears(3)
    assert task_modules(Model(nn.ModuleList(heads)), 2) == [[head] for head in heads]


@pytest.mark.parametrize(("names", "order"), [(["1", "0", "2"], [1, 0, 2]), (["digits", "letters", "0"], [0, 1, 2])])
def test_a_dict_by_the_tasks_numbers_or_else_in_its_order(names, order):
    heads = linears(3)
    found = task_modules(Model(nn.ModuleDict(dict(zip(names, heads, strict=True)))), 3)
    assert found == [[heads[i]] for i in order]


@pytest.mark.parametrize("heads", [None, nn.Linear(2, 2)])
def test_no_heads_or_one_for_all_are_shared(heads):
    assert task_modules(Model(heads), 3) == []


def test_inside_a_wrapper():
    model = Model(nn.ModuleList(linears(2)))
    assert task_modules(nn.Sequential(nn.Sequential(model)), 2) == [[head] for head in model.heads]


def test_a_method_that_says_so_comes_first():
    class Says(Model):
        def task_modules(self, t):
            return self.experts[t] if t else [self.experts[0], self.body]

    model = Says(nn.ModuleList(linears(2)))
    model.experts = nn.ModuleList(linears(2))
    assert task_modules(model, 2) == [[model.experts[0], model.body], [model.experts[1]]]
    model.task_modules = lambda t: ["experts"]
    with pytest.raises(InputError, match=r"^Says.task_modules\(0\) must return modules of the model, one or a list$"):
        task_modules(model, 2)
