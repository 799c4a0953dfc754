#!/usr/bin/env bash
# Does the trained model see? Three seeds of HyperLLaVA and its blind twin (images removed): same data, order and steps. Visual QA and
# Spatial Inference are measured on CMT-open's decision split, also with images permuted within the same question. To fit two cores,
# stage 1 learns from captions and inventories and stage 2 from these two categories, not from all seven.
#   bash scripts/study.sh                 about 100 minutes on two cores; one command on a GPU machine too. Killed, it goes on from where it was.
# Variables: SEEDS ("0 1 2"), TWINS ("hyper blind"; also static), ALIGN (500) and STEPS (1000), TRAIN (24000 items of all categories),
# ITEMS (1000 a category), JOBS (2 trainings at once), OUT (runs/study), DATA (data/cmt-open).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
export OUT=${OUT:-runs/study} STEPS=${STEPS:-1000} ALIGN=${ALIGN:-500} ITEMS=${ITEMS:-1000} DATA=${DATA:-data/cmt-open}
SEEDS=${SEEDS:-0 1 2} TWINS=${TWINS:-hyper blind} JOBS=${JOBS:-2} TRAIN=${TRAIN:-24000}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / JOBS))} OMP_WAIT_POLICY=PASSIVE

llava-collab assets --bases smollm2-135m-l4-v8k efficientnet-lite0 dinov2-s
llava-collab data build cmt-open --out "$DATA" --train "$TRAIN" --val 0 --test 1149 --decision 7000 --test-object 0 --test-template 0

align() { # SEED: stage 1, shared by this seed's models; whoever needs it first trains it, others wait
  mkdir -p "$OUT"
  flock "$OUT/align-$1.lock" python train/train.py train/recipes/smol-align.yaml --run.out "$OUT/align-$1" --run.seed "$1" \
    --run.steps "$ALIGN" --data.files.0.path "$DATA/train.jsonl"
}
student() { # SEED TWIN: both stages, then its records
  local seed=$1 twin=$2 options=() sight=(--feature-cache)
  case $twin in
    static) options=(--model.visual-expert null --model.language-expert null) ;;
    blind) options=(--data.blind) sight=(--blind) ;;
  esac
  align "$seed"
  python train/train.py train/recipes/smol-instruct.yaml --model.init-from "$OUT/align-$seed/model" --run.out "$OUT/$twin-$seed" \
    --run.seed "$seed" --run.steps "$STEPS" --data.files.0.path "$DATA/train.jsonl" \
    --data.files.0.categories "Visual QA" "Spatial Inference" "${options[@]}"
  measure "$twin-$seed" "$OUT/$twin-$seed/model" "${sight[@]}"
  [ "$twin" = blind ] || measure "$twin-$seed-permuted" "$OUT/$twin-$seed/model" "${sight[@]}" --permute-images
}
measure() { # NAME MODEL [OPTIONS]
  local name=$1 model=$2
  shift 2
  python eval/run.py --model "$model" --name "$name" --suite eval/suites/cmt-open.yaml --data-root "$DATA" --split decision \
    --categories "Visual QA" "Spatial Inference" --items-per-category "$ITEMS" --out "$OUT/records/$name" --batch-size 16 "$@"
}
export -f align student measure

for twin in $TWINS; do for seed in $SEEDS; do echo "$seed $twin"; done; done |
  xargs -P "$JOBS" -L 1 bash -euo pipefail -c 'student "$@"' student
measure majority majority
for seed in $SEEDS; do
  rows=()
  for twin in $TWINS; do
    rows+=("$OUT/records/$twin-$seed")
    [ "$twin" = blind ] || rows+=("$OUT/records/$twin-$seed-permuted")
  done
  others=()
  for row in "${rows[@]}"; do [ "$row" = "$OUT/records/blind-$seed" ] || others+=("$row"); done
  python eval/table.py "$OUT/records/majority" "${rows[@]}" --out "$OUT/tables/seed-$seed" --compare "$OUT/records/blind-$seed" "${others[@]}"
  for twin in $TWINS; do # what permuting the images costs, paired over the same questions
    [ "$twin" = blind ] || python eval/table.py "$OUT/records/$twin-$seed" "$OUT/records/$twin-$seed-permuted" \
      --out "$OUT/tables/seed-$seed-$twin-permuted" --compare "$OUT/records/$twin-$seed" "$OUT/records/$twin-$seed-permuted"
  done
done
