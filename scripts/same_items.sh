#!/usr/bin/env bash
# Are the items of CMT-open and CME-open the same under two interpreters? Builds CMT-open's test split and all of CME-open under each, in another
# temporary folder, time zone and locale, with another hash seed and number of workers, and compares the content hashes of the manifests.
#   bash scripts/same_items.sh python3.11 python3.12
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/build.py" <<'PYTHON'
import json, sys
from pathlib import Path
from llava_collab.cme import build_cme
from llava_collab.cmt import build_cmt

if __name__ == "__main__":  # workers import this file
    sizes = {"train": 0, "val": 0, "test": 1149, "decision": 0, "test_object": 0, "test_template": 0}
    folder = build_cmt(Path(sys.argv[1]), **sizes, workers=int(sys.argv[2]))
    manifest = json.loads((folder / "manifest.json").read_text())
    texts = build_cme(folder / "cme")
    print(manifest["content_sha256"], texts["content_sha256"], sys.version.split()[0], "changed packages:", ", ".join(manifest["changed_packages"]) or "none")
PYTHON
zones=(UTC Asia/Tokyo America/Lima) locales=(C.UTF-8 C POSIX)
number=0
for python in "$@"; do
  "$python" -m venv "$work/venv$number"
  # The generator needs no torch: these are the packages of the core and of the extra `assets` that draw and read.
  "$work/venv$number/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt pillow numpy PyYAML tqdm matplotlib zstandard
  mkdir -p "$work/tmp$number"
  env TMPDIR="$work/tmp$number" TZ="${zones[number % 3]}" LC_ALL="${locales[number % 3]}" PYTHONHASHSEED="$number" PYTHONPATH="$PWD" \
    "$work/venv$number/bin/python" "$work/build.py" "$work/cmt$number" $((number % 2 + 1)) | tee -a "$work/hashes"
  number=$((number + 1))
done
[ "$(cut -d' ' -f1,2 "$work/hashes" | sort -u | wc -l)" = 1 ] || { echo "error: the items differ" >&2; exit 1; }
