"""docs/library.md: its code runs, and its table is of what the tests measure."""

import re
from pathlib import Path

from gradproj.layers.find import KINDS
from tests.gradproj.layers.case import OPTIMIZERS, PRECISIONS

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_pages_code_runs(capsys):
    names: dict = {}
    for block in blocks(LIBRARY):
        exec(compile(block, "docs/library.md", "exec"), names)
    assert "the guarantee holds" in capsys.readouterr().out


def test_the_readmes_code_runs():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## GPM on your own model")[1].split("\n## ")[0]
    (block,) = blocks(section)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["memory"].n_updates == 3
    assert names["memory"].verify(names["model"], names["images"][:300]).holds


def test_the_table_has_every_kind_optimiser_and_precision():
    rows = LIBRARY.split("<!-- drift:begin -->")[1].split("<!-- drift:end -->")[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["layer", "optimiser", *PRECISIONS]
    kinds = {kind.kind for kind in KINDS} | {"tied embedding"}
    assert sorted(tuple(row[:2]) for row in cells[2:]) == sorted((kind, name) for kind in kinds for name in OPTIMIZERS)
    for row in cells[2:]:
        for value, (_, _, bound) in zip(row[2:], PRECISIONS.values(), strict=True):
            assert float(value) < bound
