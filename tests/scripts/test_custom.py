"""main_custom.py: folders of images and a file of tasks, with every method, without Python."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import main_custom
from engine import load_run
from gradproj.errors import InputError
from methods import METHODS
from models import named

pytestmark = pytest.mark.usefixtures("quick")
NAMES = ("cat", "golden retriever", "ä", "cow")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Twelve noisy images each of four classes, and a small network under a name of torchvision's."""

    def features(name):
        torch_layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()
        return nn.Sequential(*torch_layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 16

    monkeypatch.setattr(named, "features", features)
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for c, name in enumerate(NAMES):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(12):
            image = random.integers(0, 80, (9, 11, 3)) + 40 * c
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "animals" / name / f"{i}.png")
    tasks(tmp_path, "cat, golden retriever")
    return tmp_path


def tasks(folder, *lines):
    (folder / "tasks.txt").write_text("\n".join(lines), encoding="utf-8")


def main(*arguments):
    base = "--images animals --tasks tasks.txt --image_size 8 --n_epochs 2 --lr 0.02 --device cpu --quiet".split()
    return main_custom.main([*base, *arguments])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.heads != "one"])
def test_every_method(pictures, method):
    tasks(pictures, "cat, golden retriever", "ä cow")
    summary = main("--method", method)
    assert summary["finished"]
    assert summary["benchmark"] == "animals"
    assert summary["folder"].startswith(f"runs/real/animals/{method}/")
    assert [task["classes"] for task in summary["tasks"]] == [["cat", "golden retriever"], ["ä", "cow"]]
    assert load_run(summary["folder"]).model.heads[1].out_features == 2


def test_a_line_more_is_a_task_more(pictures, capsys):
    first = main()
    tasks(pictures, "cat, golden retriever", "ä cow")
    both = main("--quiet")
    assert both["accuracy"][0][0] == first["accuracy"][0][0]
    assert both["epochs"][0] == first["epochs"][0]
    assert both["folder"] != first["folder"]
    again = main_custom.main(["--config", f"{both['folder']}/config.json", "--output_dir", "again"])
    assert again["accuracy"] == both["accuracy"]


def test_other_images_in_the_same_folder(pictures):
    main()
    Image.new("RGB", (9, 9)).save(pictures / "animals" / "cat" / "3.png")
    with pytest.raises(InputError, match=r"holds a run on other tasks \(task 1, cat, golden retriever: .* images\)"):
        main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", ""], "give --images DIR and --tasks FILE"),
        (["--images", "nowhere"], "no images in nowhere"),
        (["--tasks", "nowhere"], "cannot read nowhere"),
        (["--data", "embedded"], "data is embedded; here it is always real"),
        (["--mean", "0.5"], "mean and std must have 3 values each"),
        (["--std", "0", "1", "1"], "std is 0.0; it must be positive"),
        (["--n_tasks", "2"], "n_tasks is 2, but animals has 1 tasks"),
        (["--threshold", "0.9", "--threshold_step", "-1"], None),
        (["--name", "../out"], "names a folder, so it must have letters and none of"),
    ],
)
def test_what_is_refused_leaves_nothing(pictures, arguments, message):
    if message is None:
        assert main(*arguments)["finished"]  # a single task takes no step
        return
    with pytest.raises(InputError, match=message) as caught:
        main(*arguments)
    assert "\n" not in str(caught.value)
    assert not (pictures / "runs").exists()


def test_a_class_that_is_not_there(pictures):
    tasks(pictures, "cat, dog")
    with pytest.raises(InputError, match="there is no class dog in animals; there are: cat, cow, golden retriever, ä"):
        main()


def test_summary_on_disk_is_utf_8(pictures):
    tasks(pictures, "ä cow")
    folder = main()["folder"]
    assert json.loads((pictures / folder / "summary.json").read_bytes().decode("utf-8"))["tasks"][0]["name"] == "ä, cow"
    assert "ä, cow" in (pictures / folder / "accuracy.csv").read_bytes().decode("utf-8")


def test_the_network_is_seeded(pictures):
    models = [load_run(main("--seed", seed, "--n_epochs", "1")["folder"]).model for seed in ("3", "3", "4")]
    assert torch.equal(models[0].heads[0].weight, models[1].heads[0].weight)
    assert not torch.equal(models[0].heads[0].weight, models[2].heads[0].weight)
