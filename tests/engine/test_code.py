"""Code that has changed between two starts of a run is named."""

import subprocess

import pytest

from engine import hardware
from engine.hardware import commit
from tests import tiny
from tests.tiny import run

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_made_by_other_code_says_so(tmp_path, monkeypatch, capsys):
    note = "note: it was made by the code of 0000, which is at 1111+ab now: what it computes may differ"
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(2), tiny.Network())
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(2), tiny.Network())
    assert "note: it" not in capsys.readouterr().out
    monkeypatch.setattr("engine.hardware.commit", lambda: "1111+ab")
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(2), tiny.Network(seed=1))
    said = capsys.readouterr().out
    assert "finished already" in said and note in said and "begins with other weights" in said
    run(tiny.options(tmp_path, n_tasks=3, quiet=False), tiny.benchmark(3), tiny.Network())  # goes on from the shorter
    assert note in capsys.readouterr().out


def test_the_commit_of_changed_code(tmp_path, monkeypatch):
    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "engine/hardware.py"))
    (tmp_path / "engine").mkdir()
    (tmp_path / "net.py").write_text("a = 1")
    assert commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit()
    assert len(clean) == 12
    found = [clean]
    for name, text in (("net.py", "a = 2"), ("net.py", "a = 3"), ("mine.py", "b = 1"), ("mine.py", "b = 2")):
        (tmp_path / name).write_text(text)
        found.append(commit())
        assert found[-1].startswith(f"{clean}+")
    assert len(set(found)) == 5
    (tmp_path / "notes.md").write_text("no code")
    assert commit() == found[-1]
    (tmp_path / ".#mine.py").symlink_to("nowhere")  # as an editor locks a file
    (tmp_path / "net.py").unlink()
    assert commit().startswith(f"{clean}+") and commit() not in found
