"""Write the golden loss curves anew: 20 steps of the `tiny` model on synthetic shapes, one file per set of experts.

    python tests/golden/regenerate.py

Run it only when a change is meant to alter the numbers, and say in the commit why they moved. Each line is `step loss`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from running import losses, run_here  # noqa: E402
from synthetic import write_shapes  # noqa: E402

EXPERT = '{"bottleneck": 4, "code_width": 8}'
CURVES = {"off": ("null", "null"), "visual": (EXPERT, "null"), "language": ("null", EXPERT), "both": (EXPERT, EXPERT)}


def curve(name: str, folder: Path) -> list[float]:
    """The losses of 20 steps with the experts that `name` stands for, by the real program."""
    visual, language = CURVES[name]
    data = write_shapes(folder / "shapes")
    # Experts start at zero output: at the plain rate 20 steps would not tell the four curves apart.
    experts = ("--model.visual-expert", visual, "--model.language-expert", language, "--optim.expert-lr-multiplier", "100")
    code = run_here("tiny-instruct", data, folder / "run", *experts, "--run.no-save-first", "--run.save-every", "20")
    if code != 0:
        raise RuntimeError(f"training the {name} curve failed with exit code {code}")
    return losses(folder / "run")


def read(name: str) -> list[float]:
    """The stored curve."""
    return [float(line.split()[1]) for line in (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    for name in CURVES:
        with tempfile.TemporaryDirectory() as folder:
            values = curve(name, Path(folder))
        (HERE / f"{name}.txt").write_text("".join(f"{step} {loss!r}\n" for step, loss in enumerate(values, start=1)), encoding="utf-8")
        print(f"{name}: {values[0]:.4f} -> {values[-1]:.4f}")


if __name__ == "__main__":
    main()
