#!/usr/bin/env bash
# Stage 2 with LoRA on the language model; adapters are merged into the base at the end.
# For a small machine: RECIPE=train/recipes/smol-instruct.yaml scripts/finetune_lora.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/scripts/train.sh" "${RECIPE:-$root/train/recipes/vicuna-7b-instruct-lora.yaml}" "$@"
