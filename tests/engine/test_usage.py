"""Which parameters the tasks train: heads in any container are found or refused by name, never left out in silence."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import experiment
from gradproj.errors import InputError
from methods import METHODS
from tests import tiny
from tests.tiny import run

pytestmark = pytest.mark.usefixtures("quick")
N_TASKS = 3


def linears():
    return [nn.Linear(8, tiny.N_CLASSES, bias=False) for _ in range(N_TASKS)]


class Body(nn.Module):
    """Two layers, and whatever heads a test gives it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(tiny.N_INPUTS, 16), nn.Linear(16, 8)

    def features(self, images):
        return F.relu(self.fc2(F.relu(self.fc1(images))))

    def forward(self, images, task):
        return self.head(task)(self.features(images))


class InList(Body):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(linears())

    def head(self, task):
        return self.heads[task]


class InDict(Body):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({str(t): head for t, head in reversed(list(enumerate(linears())))})

    def head(self, task):
        return self.heads[str(task)]


class ByMethod(Body):
    """Under another name, nested, and told by a method."""

    def __init__(self):
        super().__init__()
        self.classifiers = nn.ModuleDict({"all": nn.ModuleList(nn.Sequential(nn.ReLU(), head) for head in linears())})

    def task_modules(self, t):
        return self.classifiers["all"][t]

    def head(self, task):
        return self.classifiers["all"][task]


class Adapter(ByMethod):
    """What a task has of its own is no head: all tasks share that."""

    def __init__(self):
        super().__init__()
        self.classifiers = nn.ModuleDict({"all": nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(N_TASKS))})
        self.fc3 = nn.Linear(8, tiny.N_CLASSES, bias=False)

    def forward(self, images, task):
        return self.fc3(super().forward(images, task).relu())


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.ModuleDict({"net": InList()})

    def forward(self, images, task):
        return self.inside["net"](images, task)


class Unsaid(ByMethod):
    """Under another name, and not told."""

    task_modules = None


class PlainList(InList):
    """The heads are hidden from torch."""

    def __init__(self):
        super().__init__()
        heads = list(self.heads)
        del self.heads
        self.heads = heads


class PlainHidden(Body):
    def __init__(self):
        super().__init__()
        self.classifiers = [head.double() for head in linears()]

    def head(self, task):
        return self.classifiers[task]


class Wrong(ByMethod):
    """Tells the modules of another task."""

    def task_modules(self, t):
        return self.classifiers["all"][(t + 1) % N_TASKS]


class Few(InList):
    def __init__(self):
        super().__init__()
        self.heads = self.heads[:2]


class Idle(InList):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(3, 3)


class Shared(Body):
    """One head for all tasks."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def head(self, task):
        return self.heads if isinstance(self.heads, nn.Linear) else self.heads[0]


def trained(model, folder, **changes):
    """The names of the parameters that each task of a run moves."""
    moved = []

    class Watching(METHODS["naive"]):
        def before_task(self, t, task):
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

        def after_task(self, t, task):
            moved.append({name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])})

    options = tiny.options(folder, method="naive", **changes)
    experiment.run(options, tiny.benchmark(), model, Watching(model, options))
    return moved


def in_parallel():
    return nn.DataParallel(InList())


def compiled():
    return torch.compile(ByMethod(), backend="eager")


@pytest.mark.parametrize("make", [InList, InDict, ByMethod, Adapter, Wrapped, in_parallel, compiled])
def test_each_task_trains_the_shared_weights_and_its_own(tmp_path, make):
    model = make().double()
    for t, names in enumerate(trained(model, tmp_path)):
        own = {name for name in names if ".fc" not in f".{name}"}
        assert len(own) == 1
        assert f".{t}" in own.pop()
        assert len(names) == 5 + (make is Adapter)


@pytest.mark.parametrize("heads", [lambda: linears()[0], lambda: nn.ModuleList(linears()[:1])])
@pytest.mark.parametrize("method", ["gpm", "er"])
def test_one_head_shared_by_all_tasks(tmp_path, heads, method):
    model = Shared(heads()).double()
    assert all(len(names) == 5 for names in trained(model, tmp_path / "naive"))
    summary = run(tiny.options(tmp_path, method=method), tiny.benchmark(), Shared(heads()).double())
    assert summary["class_incremental"] is None  # all tasks have the same outputs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Unsaid, r"only task 1 uses classifiers.all.0.1.weight, but the model does not say that .*task_modules\(t\)"),
        (PlainList, "PlainList.heads is a plain list, whose modules torch neither trains nor saves; make it an nn.Mod"),
        (PlainHidden, r"PlainHidden uses a weight \(3, 8\) that is none of its parameters, so it would not be trained"),
        (Wrong, "classifiers.all.0.1.weight is said to belong to task 3, which does not use it"),
        (Few, r"Few has 2 heads for 3 tasks \(n_tasks\); give it one for each, or one for all"),
        (Idle, r"no task trains forgotten.weight, since none uses it; freeze it"),
    ],
)
@pytest.mark.parametrize("method", ["naive", "gpm"])
def test_what_would_not_be_trained_is_refused_by_name(tmp_path, make, message, method):
    with pytest.raises(InputError, match=message) as caught:
        run(tiny.options(tmp_path, method=method), tiny.benchmark(), make().double())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_frozen_parameters_stay(tmp_path):
    model = Idle().double()
    model.forgotten.requires_grad_(False)
    model.fc1.requires_grad_(False)
    assert all({name.partition(".")[0] for name in names} == {"fc2", "heads"} for names in trained(model, tmp_path))


def test_heads_may_wait_for_later_tasks(tmp_path):
    model = InList().double()
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(), model)
    torch.manual_seed(0)
    assert torch.equal(model.heads[2].weight, InList().double().heads[2].weight)


@pytest.mark.filterwarnings("ignore:running statistics of norm")
def test_the_trial_leaves_no_trace(tmp_path):
    """Running statistics, modes, random state and counters of the network are as they would be without it."""

    class Normalised(InList):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def features(self, images):
            return self.norm(super().features(images))

    model = Normalised().double()
    run(tiny.options(tmp_path, n_tasks=1, n_epochs=1), tiny.benchmark(), model)
    assert model.norm.num_batches_tracked == 4  # 30 images in batches of 8


def test_every_method_takes_heads_of_different_sizes(tmp_path):
    for name, method in METHODS.items():
        if method.heads == "one":
            continue
        model = InList().double()
        model.heads[1] = nn.Linear(8, 5, bias=False).double()
        assert run(tiny.options(tmp_path, method=name), tiny.benchmark(), model)["finished"], name
