"""The launchers: help, the command they would run, and what they refuse."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

import pytest
from running import ROOT

SCRIPTS = ("pretrain", "finetune", "finetune_lora")


def _run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / f"{name}.sh"
    return subprocess.run([str(script), *arguments], env=os.environ | variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_dry_run(name: str) -> None:
    told = _run(name, "--help")
    assert told.returncode == 0 and all(word in told.stdout for word in ("MODEL", "DATA", "IMAGES", "OUT", "--dry-run"))
    one = shlex.split(_run(name, "--dry-run", GPUS="1", PYTHON="python3").stdout)
    assert one[0] == "python3" and one[1] == str(ROOT / "train" / "train.py") and os.path.exists(one[2]) and len(one) == 3
    variables = {"GPUS": "8", "DATA": "a b.json", "IMAGES": "i", "OUT": "o", "MODEL": "m", "PRETRAINED": "p"}
    many = shlex.split(_run(name, "--dry-run", "--optim.lr", "1e-4", **variables).stdout)
    assert many[:4] == ["torchrun", "--standalone", "--nproc-per-node", "8"]
    model, data = "--model.language-model m --model.init-from p", "--data.files.0.path 'a b.json' --data.files.0.image-root i"
    assert many[6:] == shlex.split(f"{model} {data} --run.out o --optim.lr 1e-4")


def test_a_wrong_number_of_gpus_is_refused() -> None:
    refused = _run("pretrain", "--dry-run", GPUS="all")
    assert refused.returncode == 2 and "GPUS must be a number" in refused.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_clean() -> None:
    files = [str(ROOT / "scripts" / f"{name}.sh") for name in (*SCRIPTS, "launch_training")]
    checked = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
