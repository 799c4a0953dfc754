# shellcheck shell=bash
# Sourced by train.sh and train.slurm: reads their arguments into `program`, the command that every rank runs, and sets DRY_RUN.
root=${root:?the script that sources this names the repository}

usage() {
  sed -n '/^#SBATCH/d; 2,/^[^#]/s/^# \{0,1\}//p' "$1"
  cat <<EOF
  --preflight   only check what every rank checks before its first step (docs/training.md), and leave
  --dry-run     print what would run

Variables that stand for options of train.py, named as LLaVA's:
  MODEL         --model.language-model, LLaVA's --model_name_or_path
  VISION_TOWER  --model.vision-tower
  PRETRAINED    --model.init-from, the model folder of the stage before, LLaVA's --pretrain_mm_mlp_adapter
  DATA          --data.files.0.path, conversations, LLaVA's --data_path
  IMAGES        --data.files.0.image-root, LLaVA's --image_folder
  OUT           --run.out, run folder, LLaVA's --output_dir
  ENGINE        --run.engine: ddp, fsdp2, zero2, zero3
Variables of the launch:
  GPUS          ranks on each node                              (default: every GPU of the node; without any, one rank on the CPU)
  RESTARTS      how often ranks that die are started again      (default: 3)
  PORT          where the nodes meet, on the first of them      (default: 29400; under SLURM one made of the job's number)
  PYTHON        interpreter                                     (default: python)

The batch size of a recipe is global: it stays the same on any number of GPUs. The same command goes on with a run that was stopped.
'train/train.py RECIPE --help' explains every option. Exit codes: 0 finished, 1 error, 70 ranks died too often, 75 stopped, not finished
(run it again), 130 and 143 stopped by SIGINT and SIGTERM after saving.
EOF
}

read_arguments() { # SCRIPT ARGUMENT...
  local script=$1 preflight='' argument pair name
  local -a rest=()
  shift
  for argument in "$@"; do
    case "$argument" in
      -h | --help) usage "$script"; exit 0 ;;
      --dry-run) export DRY_RUN=1 ;;
      --preflight) preflight=1 ;;
      *) rest+=("$argument") ;;
    esac
  done
  if ((${#rest[@]} == 0)) || [[ "${rest[0]}" == -* ]]; then
    echo "error: name a recipe first, e.g. train/recipes/tiny-instruct.yaml (--help explains)" >&2
    exit 2
  fi
  # shellcheck disable=SC2154  # root is set by whoever sources this file
  program=("$root/train/train.py")
  if [ -n "$preflight" ]; then program=(-m llava_collab.cli preflight); fi
  program+=("${rest[0]}")
  for pair in MODEL=model.language-model VISION_TOWER=model.vision-tower PRETRAINED=model.init-from DATA=data.files.0.path \
    IMAGES=data.files.0.image-root OUT=run.out ENGINE=run.engine; do
    name=${pair%%=*}
    if [ -n "${!name:-}" ]; then program+=("--${pair#*=}" "${!name}"); fi
  done
  program+=("${rest[@]:1}")
}
