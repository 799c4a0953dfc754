#!/usr/bin/env bash
# Stage 2, instruction tuning: language model, projector and both experts learn.
# For a small machine: RECIPE=train/recipes/smol-instruct.yaml scripts/finetune.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/scripts/train.sh" "${RECIPE:-$root/train/recipes/vicuna-7b-instruct.yaml}" "$@"
