#!/usr/bin/env bash
# Does lmms-eval, with our model plugin and our CMT-open task, score a model as our own evaluator does? Both answer the same few questions.
#   bash scripts/lmms_eval_check.sh [MODEL]      MODEL: a model folder (default: checkpoints/hyperllava-smol); a few minutes on a CPU
# Makes an environment of its own in .venv-lmms (VENV: another folder): our core and what lmms-eval needs for such tasks, then lmms-eval
# without its other requirements, some of which break beside a CPU build of torch (`pip check` complains, rightly). Offline after that.
# Needs data/cmt-open: llava-collab data build cmt-open --out data/cmt-open. ITEMS: questions a category (default 2); OUT: folder of results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:-checkpoints/hyperllava-smol}
if [ -n "${OUT:-}" ] && [ -e "$OUT/lmms" ]; then
  echo "error: $OUT/lmms is there from an earlier run; remove it, or name another folder in OUT" >&2
  exit 1
fi
if [ ! -e data/cmt-open/test.jsonl ]; then
  echo "error: data/cmt-open/test.jsonl is not there; build it: llava-collab data build cmt-open --out data/cmt-open" >&2
  exit 1
fi

export VENV=${VENV:-.venv-lmms} EXTRAS=dev,eval,lmms
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
python -c 'import lmms_eval' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3

out=${OUT:-$(mktemp -d)}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_CACHE="$out/datasets" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m lmms_eval --model llava_collab --model_args "pretrained=$model,dtype=float32" --batch_size 4 --limit "${ITEMS:-2}" \
  --tasks cmt_open --include_path eval/lmms_eval --log_samples --output_path "$out/lmms"
python eval/lmms_check.py --model "$model" --lmms "$out/lmms" --out "$out/ours"
python -m pytest -q -p no:xdist tests/test_evaluation_lmms.py # what a machine without lmms-eval skips
