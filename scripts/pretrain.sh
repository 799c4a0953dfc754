#!/usr/bin/env bash
# Stage 1, alignment: the projector and the visual expert learn, the language model and the vision tower are frozen.
# For a small machine: RECIPE=train/recipes/smol-align.yaml scripts/pretrain.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/scripts/train.sh" "${RECIPE:-$root/train/recipes/vicuna-7b-align.yaml}" "$@"
