#!/usr/bin/env bash
# The first release, from nothing: CMT-open, three seeds of HyperLLaVA and its controls, what was tried to make the codes matter, the ablation, the
# checkpoints as small differences from their bases, their cards, and the README's tables.
#   bash scripts/reproduce_release.sh            hours on two CPU cores (so far run in pieces only); killed, it goes on
#   bash scripts/reproduce_release.sh --check    minutes: the README's tables are those of the released records, cell by cell, and the released
#                                                models give the recorded answers again (fp32 on the CPU, at least 98 % of the tokens)
# Variables: SEEDS ("0 1 2"), OUT (runs/release), LANES (2 programs at once), RECORDS (docs/results/release) and CHECKPOINTS (checkpoints) to write to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  "" | --check) ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
source scripts/setup.sh
OUT=${OUT:-runs/release} SEEDS=${SEEDS:-0 1 2} LANES=${LANES:-2} RECORDS=${RECORDS:-docs/results/release} CHECKPOINTS=${CHECKPOINTS:-checkpoints}
build() { llava-collab data build cmt-open --val 0 --test-object 0 --test-template 0 "$@"; }

llava-collab assets --bases smollm2-135m-l4-v8k efficientnet-lite0 dinov2-s
if [ "${1:-}" = --check ]; then
  build --out data/release-check --train 0 --test 70 --decision 0
  exec python eval/release.py check --data-root data/release-check
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
build --out data/cmt-open --train 24000 --test 1149 --decision 7000

python train/train.py train/recipes/smol-align-lora.yaml --run.out "$OUT/align"
torchrun --nproc-per-node 2 train/train.py train/recipes/smol-instruct-lora.yaml --run.out "$OUT/start" --model.init-from "$OUT/align/model"
sweep() { # TABLE [OPTIONS]
  python eval/sweep.py "$@" --base train/recipes/smol-experts-lora.yaml --start "$OUT/start/model" --out "$OUT" --lanes "$LANES" \
    --split decision --dtype float32 --batch-size 128
}
# shellcheck disable=SC2086 # several seeds are several words
sweep controls --seeds $SEEDS
sweep codes --seeds 0 --no-evaluate
python eval/run.py --model majority --name majority --suite eval/suites/cmt-open.yaml --split decision --out "$OUT/majority/eval"

ablate() { # ROW ITEMS A CATEGORY [OPTIONS]
  llava-collab ablate "$OUT/$1/seed-0/model" --out "$OUT/$1/seed-0/codes" --split decision --items-per-category "$2" --feature-cache "${@:3}"
}
ablate hyperllava 100
for row in expert-rate-4 attached last-prompt-token longer; do
  ablate "$row" 100 --conditions shuffled-family shuffled-category mean
done

python eval/release.py pack --runs "$OUT" --records "$RECORDS"

delta() { llava-collab delta "$OUT/$1" "$CHECKPOINTS/$2" --licence apache-2.0 "${@:3}"; }
delta align llava-smol-align
delta start llava-smol-start --base "$CHECKPOINTS/llava-smol-align"
delta hyperllava/seed-0 hyperllava-smol --base "$CHECKPOINTS/llava-smol-start"
delta llava/seed-0 llava-smol --base "$CHECKPOINTS/llava-smol-start"
delta matched-lora/seed-0 llava-smol-matched-lora --base "$CHECKPOINTS/llava-smol-start"
for name in hyperllava-smol llava-smol llava-smol-matched-lora; do # what --check asks again
  python eval/run.py --model "$CHECKPOINTS/$name" --name "$name" --suite eval/suites/cmt-open.yaml --split test --dtype float32 \
    --feature-cache --batch-size 32 --out "$OUT/test/$name"
done
python eval/release.py pack-answers --runs "$OUT"
python eval/release.py cards --runs "$OUT" --records "$RECORDS" --checkpoints "$CHECKPOINTS"
python eval/release.py tables --records "$RECORDS"
