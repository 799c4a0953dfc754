"""Golden loss curves: 20 steps of the real program must give the stored numbers, with every set of experts.

A change that is meant to alter them regenerates the files (`python tests/golden/regenerate.py`) and says why.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("golden_regenerate", HERE / "golden" / "regenerate.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.mark.parametrize("name", sorted(golden.CURVES))
def test_the_curve_is_the_stored_one(name: str, tmp_path: Path) -> None:
    expected = golden.read(name)
    assert len(expected) == 20
    assert golden.curve(name, tmp_path) == pytest.approx(expected, rel=1e-4)  # kernels differ between CPUs in the last digits


def test_curves_fall_and_differ() -> None:
    curves = {name: golden.read(name) for name in golden.CURVES}
    assert all(curve[-1] < 0.9 * curve[0] for curve in curves.values())
    ends = sorted(curve[-1] for curve in curves.values())
    assert all(b - a > 2e-4 * a for a, b in zip(ends, ends[1:], strict=False)), "the tolerance above could not tell these curves apart"
