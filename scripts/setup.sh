#!/usr/bin/env bash
# Sourced by the other scripts: a virtual environment in .venv with exactly the pinned packages, made once.
# PYTHON chooses the interpreter (3.11 or 3.12; default python3), VENV the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
extras=${EXTRAS:-assets,eval,train,dev}
stamp="$VENV/.installed-$(cat pyproject.toml requirements.txt constraints-cpu.txt <(echo "$extras") | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
  echo "== setting up $VENV"
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[$extras]"
  rm -f "$VENV"/.installed-*
  touch "$stamp"
fi
bin="$(cd "$VENV" && pwd)/bin"
export PATH="$bin:$PATH" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
