"""Methods that break the contract are refused in one line, and those that keep it are taken at their word."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from engine import experiment, load_run, state
from engine.cli import parse
from engine.folder import load_checkpoint
from engine.interrupts import Stopped
from engine.method import Method
from engine.options import Options, flag
from engine.task import LazyTasks
from gradproj.errors import InputError
from methods import METHODS
from methods.gpm import GPM
from methods.naive import Naive
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick")


def kind(base=Method, **declared):
    """A method's class that declares something."""
    return type("Mine", (base,), {"name": "mine"} | declared)


def run_with(tmp_path, method, model=None, benchmark=None, **changes):
    options = tiny.made({**vars(tiny.options(tmp_path, n_epochs=1, n_tasks=2, **changes))})
    model = model or tiny.Network(2)
    return experiment.run(options, benchmark or tiny.benchmark(2), model, method(model, options))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"name": ""}, "has no name"),
        ({"title": ["a"]}, r"title is \['a'\]; it must be text"),
        ({"place": "first"}, "place is 'first'; it must be a number from 0, or None"),
        ({"heads": "single"}, "heads is 'single'; it must be 'one', 'many' or 'any'"),
        ({"joint": 1}, "joint is 1; it must be True or False"),
        ({"state": "old"}, r"state is 'old'; it must be a tuple of names, such as \('old',\)"),
        ({"reads": "threshold_step"}, "reads is 'threshold_step'; it must be a tuple"),
        ({"reads": ("thresold",)}, "reads names thresold; it may name threshold, threshold_step, n_samples, samples"),
        ({"defaults": {"learning_rate": 1.0}}, "defaults has learning_rate, which is no hyperparameter"),
        ({"defaults": {"": {"rate": 1.0}}}, "defaults has rate"),
        ({"defaults": [1]}, r"defaults is \[1\]; it must be a dict"),
        ({"flags": [flag(1, "x")]}, "flags must be a dict"),
        ({"flags": {"my-flag": flag(1, "x")}}, "the flag 'my-flag' must be a name"),
        ({"flags": {"lambda": flag(1, "x")}}, "the flag 'lambda' must be a name"),
        ({"flags": {"momentum": flag(0.9, "x")}}, "the flag momentum is one of every run"),
        ({"flags": {"by_protocol": flag(1, "x")}}, "the flag by_protocol is one of every run"),
        ({"flags": {"config": flag(1, "x")}}, "the flag config is one of every run"),
        ({"flags": {"mine": flag(True, "x")}}, "the flag mine could not be turned off"),
        ({"flags": {"mine": flag([], "x")}}, "the flag mine has an empty default"),
        ({"refuse": lambda options: None}, "refuse must be a classmethod"),
    ],
)
def test_what_a_class_declares(declared, message):
    with pytest.raises(InputError, match=f"^method Mine: .*{message}") as error:
        kind(**declared)(tiny.Network(), Options())
    assert "\n" not in str(error.value)


def test_every_method_declares_what_it_should():
    for method in METHODS.values():
        assert {"name", "title", "place"} <= vars(method).keys(), method


def test_flags_of_one_name_and_two_kinds():
    one, two = (type("M", (Naive,), {"name": n, "flags": {"alpha": flag(v, "x")}}) for n, v in (("a", 1), ("b", 1.0)))
    with pytest.raises(
        InputError, match="^method M: its --alpha is of kind float, a's of kind int; call it otherwise$"
    ):
        parse(Options, {"a": one, "b": two}, ["--method", "b"], None)


class Undecorated(Options):
    lr: float = 0.5


@dataclass(kw_only=True)
class Untyped(Options):
    benchmark = "pmnist"
    lr = 0.5


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Undecorated, r"^Undecorated is no dataclass; write @dataclass\(kw_only=True\) above it$"),
        (Untyped, "^Untyped has lr without a type, so it has no effect; write lr: float = 0.5$"),
    ],
)
def test_a_scripts_hyperparameters_that_would_be_passed_over(script, message):
    with pytest.raises(InputError, match=message):
        parse(script, METHODS, [], None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyLinear(3)), "^Sequential: 0.weight, 0.bias has no shape yet"),
        (nn.Sequential(nn.ReLU()), "^Sequential has no parameters"),
    ],
)
def test_networks_that_cannot_be_trained(model, message):
    with pytest.raises(InputError, match=message):
        Naive(model, Options())


def returning(moment, value):
    """A method one moment of which gives something else."""
    return kind(Naive, **{moment: lambda self, *_, **__: value}, plain_step=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (returning("loss", None), r"loss\(\) gives a NoneType; it must be one number"),
        (returning("loss", 1.0), r"loss\(\) gives a float"),
        (returning("loss", torch.ones(3, requires_grad=True)), r"loss\(\) gives a tensor \(3,\)"),
        (returning("loss", torch.tensor(1.0)), r"loss\(\) gives a tensor \(\) without a gradient"),
        (returning("backward", None), r"backward\(\) gives a NoneType"),
        (returning("backward", torch.tensor(1.0)), r"backward\(\) leaves no gradient"),
        (returning("optimizer", None), r"optimizer\(\) gives a NoneType; it must be a torch.optim.Optimizer"),
        (kind(Naive, optimizer=lambda self, t, lr: torch.optim.LBFGS(self.parameters(t))), "LBFGS asks for the loss"),
        (returning("order", [0, 1]), r"order\(\) must give places of training images: int64 \(n,\), each from 0 to 29"),
        (returning("order", torch.tensor([0, 30])), r"order\(\) must give places"),
        (returning("order", torch.tensor([], dtype=torch.int64)), r"order\(\) must give places"),
        (kind(Naive, state=("nothing",)), "state names nothing, which it has not"),
        (kind(Naive, memory=[]), "memory is a list; the name is a GradientProjectionMemory's"),
    ],
)
def test_what_the_moments_give(tmp_path, method, message):
    with pytest.raises(InputError, match=f"^method mine: {message}"):
        run_with(tmp_path, method)


def test_the_title_of_another_class_is_not_inherited(tmp_path):
    summary = run_with(tmp_path, kind(GPM))
    assert (summary["title"], summary["place"]) == ("mine", None)


def test_a_network_that_changes_its_images_is_refused(tmp_path):
    class Shifting(tiny.Network):
        def forward(self, images, task):
            images -= 1
            return super().forward(images, task)

    benchmark = tiny.benchmark(2)
    before = benchmark.tasks[0].test.images.clone()
    with pytest.raises(InputError, match="^Shifting changes the images that it is given"):
        run_with(tmp_path, Naive, Shifting(2), benchmark)
    assert torch.equal(benchmark.tasks[0].test.images, before)


@pytest.mark.parametrize("value", [np.zeros(3), np.float64(1), random.Random(), {1, 2}, lambda: 0], ids=str)
def test_state_that_a_checkpoint_could_not_read_back(tmp_path, value):
    def start(self, model, options):
        Method.__init__(self, model, options)
        self.old = [value]

    with pytest.raises(InputError, match=r"^a method's state holds a \S+, which cannot be saved; it may hold tensors"):
        run_with(tmp_path, kind(__init__=start, state=("old",)))


class Auxiliary(Method):
    """Learns with a module of its own, keeps a moving mean of the network, and has one more parameter for each task."""

    name, state = "auxiliary", ("aux", "mean", "shifts")
    steps, stops_at = 0, None

    def __init__(self, model, options):
        super().__init__(model, options)
        torch.manual_seed(1)
        self.aux = nn.Linear(tiny.N_CLASSES, tiny.N_CLASSES).double()
        self.mean = nn.Linear(tiny.N_INPUTS, 16).double().requires_grad_(False)
        self.shifts = nn.ParameterList()

    def before_task(self, t, task):
        self.shifts.append(nn.Parameter(torch.zeros(tiny.N_CLASSES).double()))

    def parameters(self, t):
        return [*super().parameters(t), *self.aux.parameters(), self.shifts[t]]

    def loss(self, images, labels, t):
        return nn.functional.cross_entropy(self.aux(self.model(images, t)) + self.shifts[t], labels)

    def after_step(self, t):
        with torch.no_grad():
            self.mean.weight.lerp_(self.model.fc1.weight, 0.1)
        self.steps += 1
        if self.steps == self.stops_at:
            raise Stopped(2)


def test_modules_of_a_methods_own_are_saved_as_they_were(tmp_path):
    """Continued in the middle of a task: the same numbers as without the interruption."""
    found = {}
    for folder, stops in (("whole", [None]), ("stopped", [3 * 4 + 4 + 2, None])):
        options = tiny.options(tmp_path / folder)
        for stops_at in stops:
            method = Auxiliary(tiny.Network(), options)
            method.stops_at = stops_at  # within the second epoch of the second task
            with pytest.raises(Stopped) if stops_at else nullcontext():
                experiment.run(options, tiny.benchmark(), method.model, method)
        found[folder] = [*method.weights().values(), *method.mean.parameters()]
        assert len(method.weights()) == len(method.model.state_dict()) + 2 + 2 + 3
        loaded = load_run(tiny.run_folder(tmp_path / folder), tiny.Network(), Auxiliary)
        assert torch.equal(loaded.method.aux.weight, method.aux.weight) and len(loaded.method.shifts) == 3
    assert all(map(torch.equal, *found.values()))


class Rooms(Method):
    name, state = "rooms", ("rooms",)

    def __init__(self, model, options):
        super().__init__(model, options)
        self.rooms = self.made()


def grows(self, t, task):
    self.rooms.append(nn.Linear(1, 1))


@pytest.mark.parametrize("moment", ["before_task", "after_task"])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (list, r"a module in rooms\[0\], which __init__ did not make"),
        (nn.ModuleList, "a module in rooms, which has grown since"),
    ],
)
def test_modules_that_a_continued_run_would_lack_are_refused(tmp_path, moment, made, message):
    method = kind(Rooms, **{moment: grows, "made": lambda self: made()})
    with pytest.raises(InputError, match=f"^method mine: its state has {message}, so that a continued run would lack"):
        run_with(tmp_path, method)
    if moment == "before_task":
        assert not list(tmp_path.rglob("config.json"))
    else:  # no state that could not be continued is saved
        assert load_checkpoint(tiny.run_folder(tmp_path))["position"] == 0


def test_a_network_that_a_method_gives_more_parameters_is_refused(tmp_path):
    def before_task(self, t, task):
        self.model.extra = nn.Linear(1, 1)

    later = replace(tiny.benchmark(2), tasks=LazyTasks(2, tiny.task))
    message = r"^the network has 10 parameters, 8 when the run began; parameters of a method's own stand in its state"
    with pytest.raises(InputError, match=message):
        run_with(tmp_path, kind(before_task=before_task), tiny.Network(2), later)


def test_modules_in_a_list_that_init_makes_are_kept(tmp_path):
    method = kind(Rooms, made=lambda self: [nn.Linear(1, 1), {"a": nn.Linear(2, 2)}])
    run_with(tmp_path, method)
    loaded = load_run(tiny.run_folder(tmp_path), tiny.Network(2), method)
    assert isinstance(loaded.method.rooms[1]["a"], nn.Linear)


class Pair(NamedTuple):
    one: int
    other: torch.Tensor


@pytest.mark.parametrize(
    "value", [defaultdict(list, a=[1]), OrderedDict(b=1), (1, (2,)), Pair(1, torch.ones(1))], ids=type
)
def test_containers_stay_of_their_kind(value):
    found = state.restored(value, state.saved(value), torch.device("cpu"))
    assert type(found) is type(value) and found == value
    if isinstance(value, defaultdict):
        assert found["new"] == [] and "new" not in value


def test_another_class_of_the_same_name_is_another_method(tmp_path):
    run_with(tmp_path, kind(Naive))
    other = type("Other", (Naive,), {"name": "mine"})
    with pytest.raises(InputError, match="holds a run by another method .class .*Mine there, .*Other here."):
        run_with(tmp_path, other)


def test_a_network_that_no_memory_could_look_at_is_trained_by_methods_that_need_none(tmp_path):
    model = tiny.Network(2)
    nn.utils.parametrizations.weight_norm(model.fc1)
    summary = run_with(tmp_path, Naive, model)
    assert summary["finished"] and summary["interference"] == {}


def test_heads_that_share_a_weight_are_refused(tmp_path):
    model = tiny.Network(2)
    model.heads[1].weight = model.heads[0].weight
    with pytest.raises(
        InputError, match="^Network: heads.0.weight belongs to tasks 1, 2, so that the later ones would"
    ):
        run_with(tmp_path, GPM, model)


@dataclass(kw_only=True)
class Wide(Options):
    width: int = flag(7, "of something")


class Reading(Naive):
    name = "reading"

    def __init__(self, model, options):
        super().__init__(model, options)
        self.seen = self.options.width


def test_a_run_whose_method_reads_a_flag_of_its_script_is_loaded(tmp_path):
    values = vars(tiny.options(tmp_path, n_epochs=1, n_tasks=2))
    options = Wide(**{k: v for k, v in values.items() if k in Wide.__dataclass_fields__} | {"method": "reading"})
    options, model = replace(options, width=9), tiny.Network(2)
    experiment.run(options, tiny.benchmark(2), model, Reading(model, options))
    assert load_run(tiny.run_folder(tmp_path), tiny.Network(2), Reading).method.seen == 9


class Importance(Method):
    """One number for each weight of the network, by its name: none for a head that has not learned yet."""

    name, state = "importance", ("omega",)

    def __init__(self, model, options):
        super().__init__(model, options)
        self.omega = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def after_task(self, t, task):
        self.omega = {name: value + 1 for name, value in self.omega.items()}


def test_a_longer_run_begins_new_heads_as_the_method_does(tmp_path):
    for n_tasks in (2, 3):
        options = tiny.options(tmp_path, n_epochs=1, n_tasks=n_tasks)
        model = tiny.Network(n_tasks)
        method = Importance(model, options)
        experiment.run(options, tiny.benchmark(n_tasks), model, method)
    assert method.omega["heads.2.weight"].eq(1).all() and method.omega["fc1.weight"].eq(3).all()


def test_defaults_of_any_hyperparameter():
    """Those that are dicts themselves too, and those of other benchmarks' scripts."""
    defaults = {"samples": {"fc1": 3}, "cifar100": {"only_there": 1}}
    method = kind(GPM, defaults=defaults)(tiny.Network(), tiny.made({"n_samples": 5, "samples": {"fc1": 3}}))
    assert method.samples == {"fc1": 3}


class Frozen(Method):
    """Two parameters of its own, of which one is frozen while it learns."""

    name, state = "frozen", ("a", "b")

    def __init__(self, model, options):
        super().__init__(model, options)
        self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))


def test_weights_of_parameters_that_are_frozen_meanwhile():
    saved = Frozen(tiny.Network(), Options())
    saved.a.requires_grad_(False).fill_(1)
    saved.b.data.fill_(2)
    loaded = Frozen(tiny.Network(), Options())
    loaded.load_state_dict(saved.state_dict())
    loaded.load_weights(saved.weights())
    assert loaded.a.tolist() == [1, 1] and loaded.b.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "value", [nn.Parameter(torch.ones(2)), nn.ParameterList([torch.ones(2)]), nn.Linear(1, 1)], ids=type
)
def test_state_goes_to_the_device_of_the_model(value):
    moved = state.restored(value, state.saved(value), torch.device("meta"))
    assert {tensor.device.type for tensor in state.tensors(moved)} == {"meta"}


def test_the_parameters_of_a_list_that_an_older_version_saved():
    (found,) = state.restored(nn.ParameterList([torch.zeros(2)]), {"0": torch.ones(2)}, torch.device("cpu"))
    assert found.tolist() == [1, 1]
