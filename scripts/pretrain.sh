#!/usr/bin/env bash
# Stage 1, alignment: the projector and the visual expert learn, the language model and the vision tower are frozen.
# For a small machine: RECIPE=train/recipes/smol-align.yaml scripts/pretrain.sh
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
RECIPE="${RECIPE:-$(dirname "$here")/train/recipes/vicuna-7b-align.yaml}"

# shellcheck source=/dev/null
source "$here/launch_training.sh"
launch "Stage 1, alignment: the projector and the visual expert learn, the language model and the vision tower are frozen." "$@"
