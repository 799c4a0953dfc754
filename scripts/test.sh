#!/usr/bin/env bash
# All fast tests, lint and types, from a fresh clone: `bash scripts/test.sh`; further arguments go to pytest (`-m slow` for the slow ones).
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
  ruff check .
  pyright
  set -- -m "not slow"
fi
python -m pytest -n "${WORKERS:-2}" --dist loadfile -q "$@"
