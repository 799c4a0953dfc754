#!/usr/bin/env bash
# Are the items of CMT-open the same everywhere? Builds the test split under each interpreter, in another temporary folder, time zone, locale,
# with another hash seed and number of workers, and compares the content hashes of the manifests (lines and decoded pixels).
#   bash scripts/same_items.sh python3.11 python3.12
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
zones=(UTC Asia/Tokyo America/Lima) locales=(C.UTF-8 C POSIX)
number=0
for python in "$@"; do
  "$python" -m venv "$work/venv$number"
  # The generator needs no torch: these are the packages of the core and of the extra `assets` that draw and read.
  "$work/venv$number/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt pillow numpy PyYAML tqdm matplotlib zstandard
  mkdir -p "$work/tmp$number"
  env TMPDIR="$work/tmp$number" TZ="${zones[number % 3]}" LC_ALL="${locales[number % 3]}" PYTHONHASHSEED="$number" PYTHONPATH="$PWD" \
    "$work/venv$number/bin/python" - "$work/cmt$number" $((number % 2 + 1)) <<'PYTHON'
import json, sys
from pathlib import Path
from llava_collab.cmt import build_cmt

folder = build_cmt(Path(sys.argv[1]), train=0, val=0, test=1149, decision=0, test_object=0, test_template=0, workers=int(sys.argv[2]))
manifest = json.loads((folder / "manifest.json").read_text())
print(sys.version.split()[0], manifest["content_sha256"], "changed packages:", ", ".join(manifest["changed_packages"]) or "none")
PYTHON
  number=$((number + 1))
done | tee "$work/hashes"
[ "$(cut -d' ' -f2 "$work/hashes" | sort -u | wc -l)" = 1 ] || { echo "error: the items differ" >&2; exit 1; }
