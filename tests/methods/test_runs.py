"""Every method through whole runs: on one head and on many, and continued after a failure to the same numbers."""

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import main_pmnist
from dataloader import cifar100
from engine import load_run
from engine.cli import parse
from engine.evaluation import evaluate
from engine.experiment import Run
from engine.folder import load_checkpoint
from engine.standing import TaskProgress
from engine.task import Split, join
from engine.training import train_task
from gradproj.errors import DivergenceError, InputError
from methods import METHODS
from models import AlexNet
from report.published import SUCCESSORS
from tests import tiny
from tests.tiny import run
from tests.tiny_nets import Residual, SingleHead, method, picture_task, pictures

SINGLE_HEAD = [name for name, kind in METHODS.items() if kind.heads != "many"]
MULTI_HEAD = [name for name, kind in METHODS.items() if kind.heads != "one"]
SMALL = {"replay_batch": 4, "ogd_samples": 5, "ewc_lambda": 100.0}
CASES = [(name, SingleHead, tiny.benchmark) for name in SINGLE_HEAD]
CASES += [(name, Residual, pictures) for name in MULTI_HEAD]
cases = pytest.mark.parametrize(
    ("name", "network", "benchmark"), [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in CASES]
)


def own_flags(name: str) -> dict[str, float]:
    """Those of a method's flags that a tiny run needs other values of."""
    return {flag: value for flag, value in SMALL.items() if flag in METHODS[name].flags}


@cases
def test_runs(tmp_path, quick, name, network, benchmark):
    options = tiny.options(tmp_path, method=name, **own_flags(name))
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summary = run(options, benchmark(), model)
    n_measured = [3] if name == "multitask" else [1, 2, 3]
    rows = [[value for value in row if value is not None] for row in summary["accuracy"]]
    assert [len(row) for row in rows if row] == n_measured
    assert [len(row) for row in summary["accuracy"]] == [3, 3, 3]
    assert summary["average_accuracy"] == pytest.approx(sum(rows[-1]) / 3)
    assert (summary["backward_transfer"] is None) == (name == "multitask")
    assert (summary["memory_floats"] > 0) == (name != "naive")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any((model.state_dict()[key] != value).any() for key, value in before.items())
    loaded = load_run(tiny.run_folder(tmp_path), network())
    assert loaded.method.memory_floats() == summary["memory_floats"]
    for t, task in enumerate(benchmark().tasks):
        with loaded.method.testing(t):
            assert evaluate(loaded.model, t, task.test, options.batch_size_test)[1] == summary["accuracy"][-1][t]


@cases
def test_divergence_on_a_later_task_says_where(tmp_path, quick, name, network, benchmark):
    """Finding the step goes back to what the method was when the task began."""

    def explode(model: nn.Module, args: tuple, outputs: Tensor) -> Tensor:
        return outputs * (math.inf if model.training and args[1] == 1 else 1)

    model = network()
    model.register_forward_hook(explode)
    options = tiny.options(tmp_path, method=name, n_tasks=2, **own_flags(name))
    with pytest.raises(
        DivergenceError, match=r"^the loss is no longer finite: task 2, epoch 1, step \d, .* went first"
    ):
        run(options, benchmark(2), model)


@cases
def test_layers_called_by_keyword_are_layers_too(tmp_path, quick, name, network, benchmark):
    def by_keyword(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (), {"input": args[0]}

    matrices = []
    for keyword in (False, True):
        model = network()
        for layer in (m for m in model.modules() if keyword and isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d)):
            layer.register_forward_pre_hook(by_keyword, with_kwargs=True)
        options = tiny.options(tmp_path / str(keyword), method=name, **own_flags(name))
        matrices.append(run(options, benchmark(), model)["accuracy"])
    assert matrices[0] == matrices[1]


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_a_last_batch_of_one_image_joins_the_one_before(tmp_path, quick, name):
    """BatchNorm refuses a single image, wherever a method passes over the training images."""
    options = tiny.options(tmp_path, method=name, n_epochs=1, n_tasks=2, batch_size_train=8, **own_flags(name))
    assert run(options, tiny.benchmark(2, n_train=65), tiny.Network(2))["finished"]


@pytest.mark.parametrize(
    ("name", "flag"),
    [("trgp", "region_images"), ("cuber", "region_images"), ("code_cl", "region_images"), ("fs_dgpm", "memory_images")],
)
def test_a_single_image_for_a_task_is_refused_where_batchnorm_is(tmp_path, quick, name, flag):
    with pytest.raises(InputError, match=f"^{flag} is 1; it must be 2 or more, since the network cannot take an image"):
        run(tiny.options(tmp_path, method=name, n_tasks=2, **{flag: 1}), tiny.benchmark(2), tiny.Network(2))


def test_a_run_tested_by_a_tasks_own_statistics_says_that_it_knows_the_task(tmp_path, quick):
    changes = {"method": "naive", "n_epochs": 1, "n_tasks": 2}
    summaries = {
        kind: run(tiny.options(tmp_path / kind, batchnorm=kind, **changes), tiny.benchmark(2), tiny.Network(2))
        for kind in ("batch", "task")
    }
    assert {kind: summary["task_identity"] for kind, summary in summaries.items()} == {"batch": False, "task": True}


@cases
@pytest.mark.parametrize("n_epochs_done", [2, 4])  # within the first task of three epochs, and within the second
def test_continues_after_a_failure_to_the_same_numbers(
    tmp_path, quick, monkeypatch, name, network, benchmark, n_epochs_done
):
    changes = {"method": name, "schedule": "constant", **own_flags(name)}
    if name == "multitask":
        changes["n_epochs"] = 5  # it has one task only

    def go(folder, model):
        return run(tiny.options(tmp_path / folder, **changes), benchmark(), model)

    whole, continued = network(), network()
    expected = go("whole", whole)
    with monkeypatch.context() as patch:
        done = []
        epoch_done = Run.epoch_done

        def fail(self, *arguments):
            epoch_done(self, *arguments)
            done.append(arguments)
            if len(done) == n_epochs_done:
                raise RuntimeError("power cut")

        patch.setattr(Run, "epoch_done", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            go("cut", network())
    torch.manual_seed(99)
    found = go("cut", continued)
    for key in ("accuracy", "valid_accuracy", "backward_transfer", "memory_floats", "epochs"):
        assert found[key] == expected[key], key
    assert tiny.epochs(tmp_path / "cut") == tiny.epochs(tmp_path / "whole")
    states = [load_checkpoint(tiny.run_folder(tmp_path / folder)) for folder in ("whole", "cut")]
    for key in ("model", "method"):
        assert_close(list(leaves(states[1][key])), list(leaves(states[0][key])), atol=0, rtol=0)


def test_state_is_a_snapshot():
    """An epoch boundary's state is kept while training goes on, so nothing in it may change in place."""
    for name, network, benchmark in CASES:
        options = tiny.options("unused", method=name, **own_flags(name))
        learner = METHODS[name](network(), options)
        tasks = [join(benchmark().tasks, 2)] * 2 if learner.joint else benchmark().tasks
        snapshots = []
        for t in range(2):
            learner.before_task(t, tasks[t])
            with learner.learning(t, tasks[t]):
                train_task(learner, t, tasks[t], TaskProgress.beginning(options), lambda *_: None, time.perf_counter())
            learner.after_task(t, tasks[t])
            state = learner.state_dict()
            snapshots.append((state, [leaf.clone() for leaf in leaves(state)]))
        for state, copy in snapshots:
            assert_close(list(leaves(state)), copy, atol=0, rtol=0, msg=name)


def test_tasks_of_different_numbers_of_classes_join_into_one_of_the_most():
    tasks = [replace(task, n_classes=n) for task, n in zip(tiny.benchmark(3).tasks, (5, 3, 4), strict=True)]
    assert join(tasks, 3).n_classes == 5


def leaves(state):
    """All tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from leaves(value)


# multitask


def test_joined_tasks():
    tasks = pictures().tasks
    joined = join(tasks, 2)
    for part in ("train", "valid", "test"):
        whole = getattr(joined, part)
        for j in range(2):
            assert_close(whole.of_task(j), getattr(tasks[j], part), atol=0, rtol=0)
        assert len(whole.labels) == sum(len(getattr(tasks[j], part).labels) for j in range(2))


def test_multitask_loss_is_the_joint_loss():
    joined = join(pictures().tasks, 3).train
    index = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    model = Residual()
    model.bn_stem = model.bn1 = torch.nn.Identity()  # so that an image's logits do not depend on the others
    model.eval()
    images, labels = joined.images[index], joined.labels[index]
    each = [-model(x[None], j).log_softmax(1)[0, y] for x, (y, j) in zip(images, labels.tolist(), strict=True)]
    assert_close(method(model, "multitask").loss(images, labels, 2), sum(each) / 72)


def test_multitask_moves_the_heads_of_all_tasks(tmp_path, quick):
    model = Residual()
    before = {name: p.detach().clone() for name, p in model.heads.named_parameters()}
    run(tiny.options(tmp_path, method="multitask", n_epochs=1), pictures(), model)
    assert [name for name, p in model.heads.named_parameters() if (p == before[name]).all()] == []


def test_multitask_validation_is_over_all_tasks():
    benchmark, model = pictures(), Residual()
    joined = join(benchmark.tasks, 3)
    each = [evaluate(model, t, task.valid, 4) for t, task in enumerate(benchmark.tasks)]
    assert evaluate(model, 2, joined.valid, 4) == pytest.approx([sum(v) / 3 for v in zip(*each, strict=True)])


def test_multitask_batches_of_networks_with_batch_statistics_are_of_one_task():
    labels = join(pictures().tasks, 3).train.labels
    labels = labels[:-3]  # 24, 24 and 21 images
    generator = torch.Generator().manual_seed(0)
    order = method(Residual(), "multitask", batch_size_train=9).order(labels, generator)
    assert sorted(order.tolist()) == list(range(69))
    batches = labels[order, 1].split(9)
    assert all(len(batch.unique()) == 1 for batch in batches[:6])
    assert [batch[0].item() for batch in batches[:6]] != [0, 0, 1, 1, 2, 2]
    mixed = method(SingleHead(), "multitask", batch_size_train=9).order(labels, generator)
    assert all(len(batch.unique()) > 1 for batch in labels[mixed, 1].split(9)[:6])


# single


def test_single_trains_a_network_of_its_own_for_each_task(tmp_path, quick):
    options = tiny.options(tmp_path, method="single")
    summary = run(options, pictures(), Residual())
    for i, row in enumerate(summary["accuracy"]):
        assert row[: i + 1] == [summary["accuracy"][j][j] for j in range(i + 1)]
    assert summary["backward_transfer"] == 0
    single = METHODS["single"](Residual(), options)
    for t in range(3):  # naive training from the same start
        model = Residual()
        model.load_state_dict(single.fresh(t))
        naive = method(model, "naive")
        train_task(
            naive, t, picture_task(t), TaskProgress.beginning(naive.options), lambda *_: None, time.perf_counter()
        )
        assert evaluate(model, t, picture_task(t).test, options.batch_size_test)[1] == summary["accuracy"][t][t]


def test_single_draws_what_is_trained_alone():
    model = Residual()
    model.conv1.weight.requires_grad_(False)
    model.register_buffer("order", torch.arange(5))
    model.stem2, model.tied = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
    model.tied.weight = model.conv1.weight  # frozen under both names
    start = method(model, "single").fresh(1)
    for name in ("conv1.weight", "tied.weight", "order"):
        assert_close(start[name], model.state_dict()[name], atol=0, rtol=0)
    assert (start["stem.weight"] != model.stem.weight).double().mean() > 0.5


def test_single_starts_afresh():
    model = Residual()
    starts = {(seed, t): method(model, "single", seed=seed).fresh(t) for seed in (1, 2) for t in range(3)}
    assert_close(starts[1, 0], dict(model.state_dict()), atol=0, rtol=0)
    assert_close(starts[1, 2], method(model, "single", seed=1).fresh(2), atol=0, rtol=0)
    for a, b in [((1, 0), (1, 1)), ((1, 1), (1, 2)), ((1, 1), (2, 1))]:
        for name in ("stem.weight", "heads.1.weight"):
            assert (starts[a][name] != starts[b][name]).double().mean() > 0.5
            assert_close(starts[a][name].flatten().sort().values, starts[b][name].flatten().sort().values)


# what cannot be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "er", "memory_images": 0}, "memory_images is 0; it must be positive"),
        ({"method": "a_gem", "replay_batch": -1}, "replay_batch is -1; it must be positive"),
        ({"method": "ewc", "ewc_lambda": -1.0}, "ewc_lambda is -1.0; it must be 0 or more"),
        ({"method": "owm", "owm_alpha": 0.0}, "owm_alpha is 0.0; it must be positive"),
        ({"method": "hat", "hat_smax": 0.5}, "hat_smax is 0.5; it must be 1 or more"),
        ({"method": "hat", "hat_sparsity": -0.1}, "hat_sparsity is -0.1; it must be 0 or more"),
    ],
)
def test_refuses_values_that_no_run_can_use(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(tiny.options(tmp_path, **changes), tiny.benchmark(), tiny.Network())


# the benchmarks


@pytest.mark.parametrize("name", METHODS)
def test_permuted_mnist(tmp_path, quick, name):
    flags = ["--data", "embedded", "--n_tasks", "2", "--n_train", "4", "--n_epochs", "1", "--device", "cpu", "--quiet"]
    flags += ["--method", name, "--output_dir", str(tmp_path), "--data_dir", str(tmp_path)]
    if name == "hat":
        with pytest.raises(InputError, match="^hat is for networks with a head for each task; MLP has one for all$"):
            main_pmnist.main(flags)
        return
    assert main_pmnist.main(flags)["average_accuracy"] > 5


@pytest.fixture(scope="module")
def small_cifar100(tmp_path_factory):
    """Two tasks of a few images each."""
    whole = cifar100.load(seed=1, n_tasks=2, n_train=6, data="embedded", data_dir=tmp_path_factory.mktemp("data"))
    cut = lambda split: Split(split.images[:16], split.labels[:16])  # noqa: E731
    tasks = [
        replace(task, valid=cut(task.valid), test=cut(task.test)) for task in map(whole.tasks.__getitem__, range(2))
    ]
    return replace(whole, tasks=tasks)


@pytest.mark.slow
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_cifar100(tmp_path, quick, small_cifar100, name):
    torch.manual_seed(1)
    options = tiny.options(tmp_path, method=name, n_tasks=2, n_epochs=1, batch_size_train=16, lr=0.01)
    summary = run(options, small_cifar100, AlexNet([10, 10]))
    assert all(math.isfinite(epoch["train_loss"]) for epoch in tiny.epochs(tmp_path))
    loaded = load_run(tiny.run_folder(tmp_path), AlexNet([10, 10]))
    for t, task in enumerate(small_cifar100.tasks):
        with loaded.method.testing(t):
            assert evaluate(loaded.model, t, task.test, options.batch_size_test)[1] == summary["accuracy"][1][t]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--method gpm", 0.01), ("--method ogd", 0.001), ("--method ogd --lr 0.01", 0.01), ("--config {} --lr 0.2", 0.2)],
)
def test_a_methods_own_learning_rate_unless_another_is_given(tmp_path, flags, expected):
    config = tmp_path / "config.json"
    config.write_text('{"hyperparameters": {"method": "ogd", "lr": 0.5}}')
    assert parse(main_pmnist.Hyperparameters, METHODS, flags.format(config).split(), "")[0].lr == expected
    assert parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(config)], "")[0].lr == 0.5


def test_an_alpha_that_rounding_swallows_is_one_line(tmp_path):
    with pytest.raises(InputError, match="^owm_alpha is 1e-30; beside the inputs' energy that is nothing, give more$"):
        run(tiny.options(tmp_path, method="owm", owm_alpha=1e-30), tiny.benchmark(n_train=12), tiny.Network())


def test_steps_that_may_be_taken_otherwise_than_one_operation_at_a_time():
    assert [name for name in SUCCESSORS if METHODS[name].plain_step] == ["dual_gpm", "sgp"]
    assert [name for name in SUCCESSORS if METHODS[name].graph_step] == ["dfgp", "trgp", "code_cl"]
    assert [name for name in SUCCESSORS if METHODS[name].task_identity] == ["trgp", "code_cl", "cuber"]
