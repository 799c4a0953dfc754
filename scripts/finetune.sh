#!/usr/bin/env bash
# Stage 2, instruction tuning: language model, projector and both experts learn.
# For a small machine: RECIPE=train/recipes/smol-instruct.yaml scripts/finetune.sh
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
RECIPE="${RECIPE:-$(dirname "$here")/train/recipes/vicuna-7b-instruct.yaml}"

# shellcheck source=/dev/null
source "$here/launch_training.sh"
launch "Stage 2, instruction tuning: language model, projector and both experts learn." "$@"
