"""Many runs from one command."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from methods import METHODS
from report.published import SUCCESSORS
from sweep import __main__ as sweep
from sweep import jobs, machine, plan
from tests import ROOT
from tests.faults import process_list

# Stands for a main script: leaves what one leaves in a folder.
FAKE = """
import json, pathlib, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "began").touch()
with (folder / "epochs.jsonl").open("w") as file:
    for task, epoch in ((0, 5), (1, 1)):
        print(json.dumps({"task": task, "epoch": epoch, "train_loss": 0.5, "lr": 0.01}), file=file)
time.sleep(seconds)
(folder / "summary.json").write_text(json.dumps({
    "benchmark": "pmnist", "method": "gpm", "variant": "default", "seed": 1, "device": "cpu", "finished": True,
    "data": {"kind": "embedded"}, "average_accuracy": 90.0, "backward_transfer": -1.0, "accuracy": [[90.0]],
    "seconds": {"total": 1.0}, "hyperparameters": {"method": "gpm", "n_tasks": 2, "threshold": [0.9]},
    "commit": "c0ffee",
}))
"""


@pytest.fixture
def at_a_commit(monkeypatch):
    monkeypatch.setattr(jobs.hardware, "commit", lambda: "c0ffee")


def fake_job(tmp_path, name, seconds=0.0, code=FAKE):
    command = (sys.executable, "-u", "-c", code, str(tmp_path / name), str(seconds))
    found = {"method": "gpm", "n_tasks": 2, "threshold": (0.9,)}
    return jobs.Job(name, command, tmp_path / "logs" / f"{name}.log", tmp_path / name, found, n_epochs=5)


def commands(*argv):
    return [job.command[2:] for job in plan.make_jobs(sweep.wanted(*sweep.parse(argv)))]


def test_without_arguments_all_benchmarks_run_on_embedded_data_with_both_methods():
    found = commands()
    assert {Path(script).name for script, *_ in found} == {f"main_{name}.py" for name in plan.PAPER}
    assert len(found) == 10
    assert all(flags[:2] == ("--data", "embedded") for _, *rest in found for flags in [tuple(rest)])
    assert {flags[flags.index("--method") + 1] for flags in found} == {"gpm", "naive"}


def test_paper_passes_seeds_and_unknown_flags_on():
    found = commands(
        "paper", "--only", "pmnist", "--methods", "gpm", "--seeds", "1", "2", "--n_epochs", "3", "--device", "cpu"
    )
    expected = ("--n_epochs", "3", "--device", "cpu", "--method", "gpm", "--output_dir", "runs", "--seed")
    assert [command[1:] for command in found] == [(*expected, "1"), (*expected, "2")]
    given = commands("--n_epochs", "3")[0]
    assert [given[i + 1] for i, word in enumerate(given) if word == "--n_epochs"][-1] == "3"
    assert "--seed" not in commands("paper")[0]


def test_a_table_is_methods_by_benchmarks_by_seeds(tmp_path):
    found = commands("paper", "--table", "1", "--only", "cifar100", "five_datasets", "pmnist")
    assert len(found) == (7 + 6 + 7) * 5
    methods = {command[command.index("--method") + 1] for command in found}
    assert methods == set(METHODS) - {"naive", "single", *SUCCESSORS}
    (tmp_path / "miniimagenet").mkdir()
    assert len(commands("paper", "--table", "1", "--methods", "gpm", "naive", "--data_dir", str(tmp_path))) == 4 * 2 * 5


def test_benchmarks_that_cannot_run_are_left_out_unless_they_are_named(tmp_path, capsys):
    given = ("paper", "--data_dir", str(tmp_path))
    assert not any("main_miniimagenet" in command[0] for command in commands(*given))
    folder = tmp_path / "miniimagenet"
    expected = f"left out: miniimagenet, which cannot be downloaded and is not in {folder}; python main_miniimagenet.py"
    assert expected in capsys.readouterr().out
    assert len(commands(*given, "--only", "miniimagenet")) == 2
    folder.mkdir()
    assert len(commands(*given)) == 2 * len(plan.PAPER)
    for flags in (["--protocol", "released"], ["--protocol=released"]):
        assert len(commands(*given, *flags)) == 2 * (len(plan.PAPER) - 1)
        assert "left out: miniimagenet, whose protocols are paper and later\n" in capsys.readouterr().out
    assert len(commands(*given, "--protocol", "paper")) == 2 * len(plan.PAPER)


def test_the_successors_table_is_gpm_and_what_came_after_it():
    found = commands("paper", "--table", "successors", "--seeds", "1", "--only", "pmnist")
    methods = [command[command.index("--method") + 1] for command in found]
    assert methods == ["gpm", "dual_gpm", "sgp", "dfgp", "trgp", "code_cl", "cuber", "fs_dgpm", "adam_nscl"]
    assert len(commands("paper", "--table", "successors", "--data_dir", "nowhere")) == (len(plan.PAPER) - 1) * 9 * 5


def test_methods_that_do_not_fit_a_benchmark_are_left_out(capsys):
    found = commands("paper", "--methods", "hat", "ogd", "gpm", "--only", *set(plan.PAPER) - {"miniimagenet"})
    assert len(found) == 2 * 4
    assert not any("hat" in command and "main_pmnist" in command[0] for command in found)
    assert {command[0] for command in found if "ogd" in command} == {str(ROOT / "main_pmnist.py")}
    assert "left out: pmnist hat, which is for networks with a head for each task\n" in capsys.readouterr().out
    assert sweep.main(["paper", "--only", "pmnist", "--methods", "hat"]) == 2
    assert "leaves nothing to run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n_jobs", "cores", "gpu", "gigabytes", "expected"),
    [
        (8, 2, None, 24, 2),
        (1, 2, None, 24, 1),
        (100, 64, None, 64, 10),
        (8, 4, None, 1, 1),
        (8, 16, 80, 128, 4),  # a quarter of a GPU each
        (8, 16, 12, 128, 2),  # as many as its memory holds
        (8, 16, 4, 128, 1),
    ],
)
def test_runs_side_by_side_as_the_machine_allows(monkeypatch, n_jobs, cores, gpu, gigabytes, expected):
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: gpu is not None)
    properties = SimpleNamespace(total_memory=(gpu or 0) * 2**30)
    monkeypatch.setattr(machine.torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(machine, "available_memory", lambda: gigabytes * 2**30)
    assert machine.default_jobs(n_jobs) == expected


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("4,2", 4), ("", None), ("0", None), ("many", None)])
def test_threads_that_the_environment_asks_for(monkeypatch, text, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert machine.wanted_threads() == expected


def test_a_sweep_runs_gpm_at_each_value():
    found = commands("paper", "--only", "pmnist", "--sweep", "threshold=0.9 0.95 0.95,0.99", "--seeds", "1")
    tail = [command[command.index("--threshold") + 1 :] for command in found]
    assert tail == [("0.9", "0.95", "0.95", "--seed", "1"), ("0.99", "--seed", "1")]
    assert all("gpm" in command for command in found)
    methods = ("--methods", "gpm", "ewc")
    assert len(commands("paper", "--only", "pmnist", "--sweep", "lr=0.1,0.2", *methods)) == 4


@pytest.mark.parametrize(
    "argv",
    [
        ["papers"],
        ["--only", "imagenet"],
        ["--jobs", "0"],
        ["--table", "1"],
        ["paper", "--methods", "magic"],
        ["paper", "--seed", "3"],
        ["paper", "3"],
        ["--sweep", "threshold"],
        ["--sweep", "threshold=0.9"],
        ["--sweep", "threshold=0.9,0.9"],
        ["--sweep", "threshold=0.9,"],
        ["--sweep", "threshold=0.9,0.99", "--threshold", "0.95"],
        ["paper", "--method=naive"],
        ["--figures", __file__],
        ["paper", "--seed=3"],
        ["paper", "--run_folder", "here"],
        ["paper", "--only", "pmnist", "--sweep", "method=gpm,ewc"],
        ["paper", "--only", "pmnist", "--sweep", "treshold=0.9,0.99"],
        ["paper", "--only", "pmnist", "--sweep", "threshold=0.9,high"],
        ["paper", "--only", "pmnist", "--sweep", "lr=0.1,0.2", "--sweep", "momentum=0.1,0.2"],
        ["paper", "--n_epohcs", "3"],
        ["paper", "--seeds", "1", "1"],
        ["--data", "real"],
        ["--gpus_per_run", "0.5"],
        ["--ray", "local", "--gpus_per_run", "-1"],
    ],
)
def test_bad_input_is_one_line_and_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "threshold=0.9,0.90"], "pmnist gpm threshold 0.9 and pmnist gpm threshold 0.90 are the same run"),
        (
            ["--sweep", "lr_factor=3,4"],
            "--sweep lr_factor is read by --schedule plateau alone, and pmnist's is constant",
        ),
        (["--sweep", "output_dir=a,b"], "--sweep output_dir: it changes nothing that a run measures"),
        (
            ["--sweep", "ewc_lambda=1,2"],
            "--ewc_lambda is a flag of ewc, which this command does not run; add --methods",
        ),
        (["--methods", "code_cl", "--n_samples", "all"], "n_samples is all; code_cl holds the inputs of all samples"),
        (
            ["--methods", "cuber", "--momentum", "0.9"],
            "momentum is 0.9; cuber closes directions while a task is learned",
        ),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(flags, message, capsys):
    assert sweep.main(["paper", "--only", "pmnist", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"run_experiments.sh: error: {message}") and said.count("\n") == 1


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path, capsys):
    bad = fake_job(tmp_path, "bad", code="import sys; print('no such thing', file=sys.stderr); sys.exit(2)")
    outcome = jobs.run_jobs([fake_job(tmp_path, "first"), bad, fake_job(tmp_path, "last")], 2, 1)
    assert outcome.failed == [bad]
    assert sorted(outcome.folders) == [tmp_path / "first", tmp_path / "last"]
    said = capsys.readouterr().out
    assert "bad: FAILED with exit code 2" in said and "no such thing" in said
    assert "first: ACC 90.00 %, BWT -1.00" in said and "first: 1 of 2 tasks learned\n" in said


def test_tasks_that_are_learned_together_are_learned_at_the_end(tmp_path, capsys):
    job = fake_job(tmp_path, "joint", code=FAKE.replace("(0, 5), (1, 1)", "(1, 1), (1, 2)"))
    job = job._replace(hyperparameters=job.hyperparameters | {"method": "multitask"})
    assert jobs.run_jobs([job], 1, 1).folders == [tmp_path / "joint"]
    said = capsys.readouterr().out
    assert "joint: ACC 90.00 %" in said and "tasks learned" not in said


def test_a_log_keeps_what_earlier_starts_said(tmp_path, capsys):
    first = fake_job(tmp_path, "a", code="print('learned for hours'); raise SystemExit(3)")
    jobs.run_jobs([first], 1, 1)
    assert "FAILED with exit code 3 after 0 s: learned for hours" in capsys.readouterr().out
    jobs.run_jobs([fake_job(tmp_path, "a", code="raise SystemExit(9)")], 1, 1)
    assert "FAILED with exit code 9 after 0 s: it said nothing" in capsys.readouterr().out
    assert first.log.read_text() == "learned for hours\n"


@pytest.mark.usefixtures("at_a_commit")
def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    job = fake_job(tmp_path, "once")
    jobs.run_jobs([job], 1, 1)
    (tmp_path / "once/began").unlink()
    assert jobs.run_jobs([job], 1, 1).folders == [tmp_path / "once"]
    assert not (tmp_path / "once/began").exists()
    (tmp_path / "once/summary.json").write_text("{")  # damaged since: run it again
    jobs.run_jobs([job], 1, 1)
    assert (tmp_path / "once/began").exists()


@pytest.mark.usefixtures("at_a_commit")
def test_a_finished_run_of_other_hyperparameters_is_not_taken_for_the_one_asked_for(tmp_path):
    job = fake_job(tmp_path, "once")
    jobs.run_jobs([job], 1, 1)
    (tmp_path / "once/began").unlink()
    jobs.run_jobs([job._replace(hyperparameters=job.hyperparameters | {"threshold": (0.95,)})], 1, 1)
    assert (tmp_path / "once/began").exists()  # its own script is asked, which refuses or begins anew


@pytest.mark.parametrize("changed", [{"data_dir": "elsewhere"}, {}])
def test_a_finished_run_is_looked_at_again_where_its_images_may_be_others(tmp_path, changed):
    job = fake_job(tmp_path, "a")
    jobs.run_jobs([job], 1, 1)
    assert jobs.is_finished(job, "c0ffee")
    other = job._replace(hyperparameters=job.hyperparameters | changed)
    assert jobs.is_finished(other, "c0ffee") is not bool(changed)
    assert not jobs.is_finished(job._replace(command=(*job.command, "--no_resume")), "c0ffee")


@pytest.mark.parametrize("commit", ["decaf", "c0ffee+decaf", None])
def test_a_finished_run_is_looked_at_again_where_the_code_may_be_other(tmp_path, commit):
    """A network edited since is another experiment, which its script refuses to take for this one."""
    job = fake_job(tmp_path, "a")
    jobs.run_jobs([job], 1, 1)
    assert not jobs.is_finished(job, commit)


def test_jobs_know_where_their_images_are():
    (job, *_) = plan.make_jobs(sweep.wanted(*sweep.parse(["paper", "--only", "pmnist", "--data_dir", "mine"])))
    assert job.hyperparameters["data_dir"] == "mine"


def test_a_methods_flag_goes_to_that_method_alone(capsys):
    found = commands("paper", "--only", "pmnist", "--methods", "gpm", "ewc", "--ewc_lambda", "3", "--threshold", "0.9")
    assert [("--ewc_lambda" in command, "--threshold" in command) for command in found] == [
        (False, True),
        (True, False),
    ]
    assert sweep.main(["paper", "--ewc_lambda", "3"]) == 2
    assert "--ewc_lambda is a flag of ewc, which this command does not run" in capsys.readouterr().err


def test_no_more_than_n_at_once(tmp_path):
    code = FAKE.replace("time.sleep(seconds)", "time.sleep(0.3); (folder / 'over').write_text(str(time.time()))")
    code = code.replace('(folder / "began").touch()', "(folder / 'began').write_text(str(time.time()))")
    jobs.run_jobs([fake_job(tmp_path, name, code=code) for name in "abc"], 1, 1)
    began, over = ([float((tmp_path / n / what).read_text()) for n in "abc"] for what in ("began", "over"))
    assert over[0] <= began[1] and over[1] <= began[2]


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_stops_every_run(tmp_path, signal_number, code):
    program = f"""
import signal, sys
from pathlib import Path
from sweep import jobs, __main__ as sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may have them ignore it
folder = Path("{tmp_path}")
command = lambda name: (sys.executable, "-u", "-c", {FAKE!r}, str(folder / name), "60")
plan = [jobs.Job(n, command(n), folder / (n + ".log"), folder / n, {{"n_tasks": 2}}, 5) for n in "ab"]
sweep.make_jobs = lambda wanted: plan
sys.exit(sweep.main(["--jobs", "2"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / name / "began").exists() for name in "ab") and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal_number)
        assert process.wait(20) == code
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while f"{tmp_path}/a" in process_list():
        assert time.monotonic() < deadline, "a run outlived its sweep"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_runs_end_with_one_table_and_pictures(tmp_path):
    flags = ["--n_tasks", "2", "--n_train", "20", "--n_epochs", "1", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "sweep", "--only", "pmnist", *flags]
    for _ in range(2):  # the second time nothing is left to run
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        table = [line for line in done.stdout.splitlines() if line.startswith("permuted MNIST")]
        assert ["GPM" in table[0], "naive" in table[1]] == [True, True]
        pictures = [Path(line.strip()) for line in done.stdout.splitlines() if line.endswith(".png")]
        assert len(pictures) >= 6 and all(path.exists() for path in pictures)
    assert done.stdout.count("finished before") == 2
    alone = ["--data", "embedded", *flags[:-1], str(tmp_path / "alone"), "--quiet"]
    subprocess.run([sys.executable, "main_pmnist.py", *alone], cwd=ROOT, check=True, capture_output=True, timeout=300)
    (single,), (swept,) = (
        (tmp_path / name).glob("pmnist/gpm/*/*/accuracy.csv") for name in ("alone/embedded", "embedded")
    )
    assert single.read_text() == swept.read_text()
