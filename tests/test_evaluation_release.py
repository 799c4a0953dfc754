"""The release's tables: computed from records alone, and the check that finds a cell that is not theirs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import running

from llava_collab.evaluation.ablate import VARIANCES
from llava_collab.evaluation.records import LOSSES, RECORDS, RecordError, open_run, read_rows, write_rows
from llava_collab.evaluation.report import CATEGORIES
from llava_collab.files import write_json


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return running.program("eval/release.py")


def write(folder: Path, name: str, score: float) -> None:
    """Three items of every category, all with one score."""
    rows: list[dict[str, Any]] = [
        {"sample_id": f"{category}-{i}", "category": category, "metric": "m", "references": ["x"], "scores": {}, "output": "x"}
        | {"score": score, "status": "ok", "error": None, "seconds": 0.1, "usage": {"generated_tokens": 1, "flops": 1.0}}
        for category in CATEGORIES
        for i in range(3)
    ]
    open_run(folder, {"model": name, "items": {"all": len(rows)}}, {})
    write_rows(folder, rows)


@pytest.fixture
def records(release: ModuleType, tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    write(runs / "majority" / "eval", "majority", 10)
    for number, row in enumerate(name for name in release.ROWS if name != "majority"):
        for seed in (0, 1):
            write(runs / row / f"seed-{seed}" / "eval", row, 40 + 2 * number + seed)
    for row in release.TRIED:
        codes = runs / row / "seed-0" / "codes"
        for condition, score in (("own", 50), ("mean", 47)):
            write(codes / condition, condition, score)
            write_json(codes / condition / LOSSES, {row["sample_id"]: score / 100 for row in read_rows(codes / condition)})
        write_json(codes / VARIANCES, {})
    assert release.Pack(runs, tmp_path / "records").run() == 0
    assert not list((tmp_path / "records").rglob(RECORDS))  # all of them compressed
    return tmp_path / "records"


def test_tables_come_from_the_records(release: ModuleType, records: Path) -> None:
    lines = release.tables(records).splitlines()
    assert "| HyperLLaVA | " + " | ".join(["48.5 ± 0.7"] * 8) + " |" in lines
    assert "| C1 static LLaVA | " + " | ".join(["40.5 ± 0.7"] * 8) + " |" in lines
    all_seven = "; ".join(f"{release.SHORT.get(name, name)} +2.0 [+2.0, +2.0]" for name in CATEGORIES)
    assert f"| C5 LoRA, as many parameters | +2.0 [+2.0, +2.0] | 0.0 | {all_seven} |" in lines  # seeds and items are paired
    assert "| as released | the mean code of all samples | -0.0300 [-0.0300, -0.0300] | -3.0 [-3.0, -3.0] | 50.0 |" in lines


def test_a_cell_that_is_not_the_records_is_found(
    release: ModuleType, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "MODELS", {"some": "llava"})
    monkeypatch.setattr(release.Check, "_regenerate", lambda self, name: self.items / 100)
    text = release.tables(records)
    (tmp_path / "README.md").write_text(
        f"# Title\n\n| another | table |\n\n{release.SECTION} More\n\n{text}\n\n## Next\n\n| a third |\n", encoding="utf-8"
    )
    assert release.Check(tmp_path, items=98, records=records).run() == 0
    assert release.Check(tmp_path, items=97, records=records).run() == 1
    (tmp_path / "README.md").write_text(f"{text}\n{release.SECTION}\n{text.replace('48.5', '48.6', 1)}", encoding="utf-8")
    with pytest.raises(RecordError, match=r"copy them anew:\n\| HyperLLaVA \| 48\.6"):
        release.Check(tmp_path, records=records).run()


def test_the_readme_is_what_the_released_records_give(release: ModuleType) -> None:
    assert release.check_readme(release.RECORDS) == 35
