"""The command: help for every verb, the doctor's root causes, core imports with the core alone."""

import subprocess
import sys

import pytest
from synthetic import write_shapes

from llava_collab.cli import main
from llava_collab.doctor import CORE, OPTIONAL, report, root_cause
from llava_collab.files import read_json

VERBS = [
    "doctor",
    "assets",
    "data",
    "data check",
    "data shard",
    "data build",
    "data build cmt-open",
    "data build cmt-public",
    "data build cme-open",
    "ask",
    "chat",
    "export",
    "ablate",
    "inspect",
    "convert",
    "estimate",
]


@pytest.mark.parametrize("verb", [[], *map(str.split, VERBS)])
def test_every_verb_has_help(verb: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0 and "usage: llava-collab" in capsys.readouterr().out


def test_doctor_reports_versions_and_devices() -> None:
    text, _ = report()
    assert all(f"{name} " in text for name in CORE) and "cpu:" in text and "assets:" in text


def test_root_cause_is_the_first_of_the_chain() -> None:
    try:
        try:
            raise OSError("the real one")
        except OSError as error:
            raise ImportError("could not import") from error
    except ImportError as error:
        assert str(root_cause(error)) == "the real one"


def test_core_imports_need_no_extra() -> None:
    """Every module of the library imports in a process where each optional package is hidden."""
    program = f"""
import importlib, pkgutil, sys
hidden = {sorted(set(OPTIONAL) | {"torchvision", "open_clip", "datasets", "onnxruntime", "anls_star", "pytest", "hypothesis", "faker"})!r}
sys.modules.update(dict.fromkeys(hidden))  # None there makes an import fail and find_spec find nothing, as if not installed
import llava_collab
names = [m.name for m in pkgutil.walk_packages(llava_collab.__path__, "llava_collab.")]
names.remove("llava_collab.evaluation.lmms_eval.model")  # lmms-eval imports it, and it subclasses lmms-eval's model
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 30


def test_a_missing_model_folder_is_one_line(capsys: pytest.CaptureFixture, tmp_path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["ask", str(tmp_path / "m"), "hello"])
    assert stop.value.code == 2 and "config.json" in capsys.readouterr().err


def test_data_are_sharded_and_checked(capsys: pytest.CaptureFixture, tmp_path) -> None:
    data = write_shapes(tmp_path / "data", 40)
    (data.parent / "5.png").unlink()
    command = ["data", "shard", str(data), "--images", str(data.parent), "--out", str(tmp_path / "shards"), "--per-shard", "16"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--workers", "1", "--max-bad-fraction", "0"])
    assert stop.value.code == 2 and "1 of 40 samples are bad" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--workers", "1"])
    said = capsys.readouterr()
    assert stop.value.code == 0 and "39 samples with 34 pictures in 3 shards" in said.out and "left out 1 bad samples" in said.err
    assert read_json(tmp_path / "shards" / "index.json")["left_out"] == {"missing_image": 1}
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(tmp_path / "shards" / "index.json")])
    assert stop.value.code == 0 and "39 samples" in capsys.readouterr().out
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(tmp_path / "shards" / "index.json")])
    assert stop.value.code == 2 and "shard-000001.tar is missing" in capsys.readouterr().err
