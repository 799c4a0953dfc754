#!/usr/bin/env bash
# Sourced by pretrain.sh, finetune.sh and finetune_lora.sh: turns their variables into one training command, on one GPU, many, or a CPU.
# A caller sets RECIPE and calls `launch DESCRIPTION ARGUMENT...`; the user's variables and arguments win.

usage() {
  cat <<EOF
$1

usage: [VARIABLE=value ...] scripts/$(basename "$0") [--dry-run] [--help] [train.py options, e.g. --optim.lr 1e-4]

  RECIPE        recipe file                                   (now: $RECIPE)
  MODEL         language model, LLaVA's --model_name_or_path  (default: the recipe's)
  VISION_TOWER  vision tower                                  (default: the recipe's)
  PRETRAINED    model folder of the stage before, LLaVA's --pretrain_mm_mlp_adapter (default: the recipe's)
  DATA          conversations, LLaVA's --data_path            (default: the recipe's)
  IMAGES        image folder, LLaVA's --image_folder          (default: the recipe's)
  OUT           run folder, LLaVA's --output_dir              (default: the recipe's)
  GPUS          processes to start                            (default: every GPU of this machine)

The batch size of a recipe is global: it stays the same on any number of GPUs. --dry-run prints the command and runs nothing.
EOF
}

count_gpus() {
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --list-gpus 2>/dev/null | wc -l
  else
    echo 0
  fi
}

launch() {
  local description="$1" dry_run=no root command
  shift
  local -a rest=()
  for argument in "$@"; do
    case "$argument" in
      --help | -h) usage "$description"; return 0 ;;
      --dry-run) dry_run=yes ;;
      *) rest+=("$argument") ;;
    esac
  done
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  local gpus="${GPUS:-$(count_gpus)}"
  if [[ ! "$gpus" =~ ^[0-9]+$ ]]; then
    echo "error: GPUS must be a number, not '$gpus'" >&2
    return 2
  fi
  if ((gpus > 1)); then
    command=(torchrun --standalone --nproc-per-node "$gpus")
  else
    command=("${PYTHON:-python}")
  fi
  command+=("$root/train/train.py" "$RECIPE")
  [[ -n "${MODEL:-}" ]] && command+=(--model.language-model "$MODEL")
  [[ -n "${VISION_TOWER:-}" ]] && command+=(--model.vision-tower "$VISION_TOWER")
  [[ -n "${PRETRAINED:-}" ]] && command+=(--model.init-from "$PRETRAINED")
  [[ -n "${DATA:-}" ]] && command+=(--data.files.0.path "$DATA")
  [[ -n "${IMAGES:-}" ]] && command+=(--data.files.0.image-root "$IMAGES")
  [[ -n "${OUT:-}" ]] && command+=(--run.out "$OUT")
  command+=("${rest[@]}")
  if [[ "$dry_run" == yes ]]; then
    printf '%q ' "${command[@]}"
    echo
    return 0
  fi
  exec "${command[@]}"
}
