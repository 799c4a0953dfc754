"""Several trainings one after the other in the same processes, for tests that compare them: `torchrun ... tests/many_runs.py RUNS.json`.

RUNS.json: a list of {"arguments": command line of the training program, "from": run folder or null}. With "from", the run goes on from a
copy of that run, cut back to its checkpoint "step". Writes the exit codes to RUNS.codes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from running import program


def cut_back(source: Path, run: Path, step: int) -> None:
    """A copy of a finished run as it stood after `step`."""
    shutil.copytree(source, run)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "model")
    for later in (run / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


def main(path: Path) -> None:
    """Run them all; a run that raises ends the rest."""
    Accelerator.end_training = lambda self: None  # it takes the process group down, which can't be put up again under torchrun
    train = program()
    codes = []
    for run in json.loads(path.read_text(encoding="utf-8")):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(123)  # a fresh process would not be where the last run left the generator either
        if run["from"] is not None:
            if PartialState(cpu=True).is_main_process:
                cut_back(Path(run["from"]), Path(run["arguments"][run["arguments"].index("--run.out") + 1]), run["step"])
            PartialState().wait_for_everyone()
        codes.append(train.main(run["arguments"]))
    if os.environ.get("RANK", "0") == "0":
        path.with_suffix(".codes").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
