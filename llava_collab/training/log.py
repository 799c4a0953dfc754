"""What a run says about itself: log.jsonl (always), TensorBoard (where installed), a progress bar, and the experts' health."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from llava_collab.files import write_text

RATIO_ALARM = 1.0
ALIVE = 0.003  # output ratio that says an expert has taken part
DEAD = 0.1  # of its largest output ratio: below, it has died


class RunLog:
    """Writes one JSON line per logged step to `<run>/log.jsonl`; only the main process makes one that writes.

    A resumed run first drops the lines of steps that it is about to do again, so each step stands in the log once.
    """

    def __init__(self, run: Path, first_step: int, last_step: int, active: bool) -> None:
        self.active = active
        self._path = run / "log.jsonl"
        self._board: Any = None
        self._bar = tqdm(total=last_step, initial=first_step, unit="step", disable=not active, dynamic_ncols=True)
        if not active:
            return
        self._trim(first_step)
        self._stream = self._path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def _trim(self, first_step: int) -> None:
        rows = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= first_step]
        write_text(self._path, "".join(kept))

    def step(self, row: dict[str, Any], write: bool) -> None:
        """Advance the bar; if `write`, add the row to the files (nested dicts become `a/b` in TensorBoard)."""
        if not self.active:
            return
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", tokens_s=f"{row['tokens_per_second']:.0f}", refresh=False)
        self._bar.update()
        if not write:
            return
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in _flat(row):
                self._board.add_scalar(name, value, row["step"])

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        if self.active:
            self._stream.close()
            if self._board is not None:
                self._board.close()


class ExpertHealth:
    """Reads `statistics()` of a model's hypernetworks on the steps that are logged (spec: weight norms, collapse, output ratio)."""

    def __init__(self, model: nn.Module) -> None:
        found = {name.rpartition(".")[2]: module for name, module in model.named_modules() if hasattr(module, "statistics")}
        self._experts: dict[str, Any] = {name: module for name, module in found.items() if hasattr(module, "monitor")}
        self._peaks: dict[str, float] = {}
        self._told: set[str] = set()

    def watch(self, on: bool) -> None:
        """Have the next forward passes keep the figures, or not."""
        for expert in self._experts.values():
            expert.monitor = on

    def read(self) -> dict[str, dict[str, float]]:
        """Figures by expert, of the last watched forward pass."""
        return {name: expert.statistics() for name, expert in self._experts.items()}

    def alarms(self, figures: dict[str, dict[str, float]]) -> list[str]:
        """Warnings for experts that put out more than the layer they are added to, or nothing any more (told once, until it changes)."""
        ratios = {name: values["output_ratio"] for name, values in figures.items() if "output_ratio" in values}
        for name, ratio in ratios.items():  # at the start all put out nothing
            self._peaks[name] = max(ratio, self._peaks.get(name, ALIVE))
        loud = {name for name, ratio in ratios.items() if ratio > RATIO_ALARM}
        dead = {name for name, ratio in ratios.items() if self._peaks[name] > ALIVE and ratio < DEAD * self._peaks[name]}
        new, self._told = (loud | dead) - self._told, loud | dead
        lines = []
        for name in sorted(new):
            trouble = "it drowns the pretrained model" if name in loud else f"once it was {self._peaks[name]:.2g} times; it is dying"
            rate = "optim.visual_expert_lr" if name.startswith("visual") else "optim.expert_lr_multiplier"
            lines.append(f"ALARM: {name} puts out {ratios[name]:.2g} times what the layer beside it does; {trouble}. Lower {rate}.")
        return lines


def _flat(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for key, value in row.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            pairs.append((prefix + key, float(value)))
    return pairs
