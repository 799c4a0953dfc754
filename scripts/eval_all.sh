#!/usr/bin/env bash
# Everything that HyperLLaVA is measured by, for one model: CMT-open by our evaluator, then the paper's public benchmarks by lmms-eval.
#   bash scripts/eval_all.sh MODEL OUT [--dry-run]      GPUS: processes, a GPU each (default: every GPU of this machine)
# Results: OUT/cmt-open (records.jsonl) and OUT/public (lmms-eval's files, table.md). Started again, it does what is left.
# Needs lmms-eval 0.7.3 in the current environment, data/cmt-open, the hub for the public data sets, and the judge's key where one judges.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ] || [ $# -gt 3 ] || { [ $# -eq 3 ] && [ "$3" != --dry-run ]; }; then
  sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
model=$1 out=$2 dry=${3:-}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
if [ "$gpus" -gt 1 ]; then launch=(python -m torch.distributed.run --standalone --nproc-per-node "$gpus"); else launch=(python) gpus=1; fi

cmt=("${launch[@]}" eval/run.py --model "$model" --suite eval/suites/cmt-open.yaml --out "$out/cmt-open" --batch-size 32)
public=(python eval/public.py run --model "$model" --out "$out/public" --gpus "$gpus")
if [ -n "$dry" ]; then
  printf '%q ' "${cmt[@]}"
  echo
  exec "${public[@]}" --dry-run
fi
mkdir -p "$out/public"
status=0
"${cmt[@]}" || status=1
"${public[@]}" || status=1
python eval/public.py table "$out/public" | tee "$out/public/table.md"
exit "$status"
