#!/usr/bin/env bash
# What paper_7b.sh and paper_13b.sh share; the first argument is the size.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() { # SIZE
  cat <<EOF
HyperLLaVA-$1 as the paper trains it, in two stages: alignment on LLaVA's 558K captions, then instruction tuning on its 665K mixture.

  [VARIABLE=value ...] scripts/paper_$1.sh [train.py options, for both stages]
  SBATCH="--nodes 4 --gpus-per-node 8 --time 24:00:00" scripts/paper_$1.sh      two SLURM jobs, the second after the first

  --dry-run     print the commands, with memory and hours by 'llava-collab estimate' (not measured: arithmetic and an assumed utilisation)

  SBATCH        options of sbatch; without it, the stages run here and now, on this machine or on HOSTS
  ESTIMATE      options of 'llava-collab estimate', e.g. "--gpus 32 --tflops 989"     (default: --gpus 8, of 312 TFLOP/s)
  and all of scripts/train.sh (its --help): GPUS, HOSTS, ENGINE, ...

Data: data/LLaVA-Pretrain and data/llava, laid out as LLaVA's (train/recipes/vicuna-$1-*.yaml name the files). The same command goes on
where it was stopped.
EOF
}

cost() { # RECIPE SAMPLES: memory at the longest sample; hours with samples of 640 tokens (an image and a line) and with the longest
  local -a call
  read -ra call <<<"${ESTIMATE:---gpus 8}"
  call=("${PYTHON:-python}" -m llava_collab.cli estimate "$1" --samples "$2" "${call[@]}" "${options[@]}")
  export PYTHONWARNINGS=ignore PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  "${call[@]}" --tokens 640 | sed -n 's/.* take .* hours on .*/    &/p'
  "${call[@]}" | sed -n 's/^each of .*\|.* take .* hours on .*/    &/p'
}

main() { # SIZE [OPTION ...]; a function, which bash reads whole: an edit of this file does not reach a run that is on
  local size=$1 dry='' previous='' argument stage recipe
  local -a options=() command
  for argument in "${@:2}"; do
    case "$argument" in
      -h | --help) usage "$size"; exit 0 ;;
      --dry-run) dry=1 ;;
      *) options+=("$argument") ;;
    esac
  done
  cd "$root" # the recipes name data and runs from here
  for stage in align:558128 instruct:665298; do
    recipe=train/recipes/vicuna-$size-${stage%:*}.yaml
    command=(scripts/train.sh)
    if [ -n "${SBATCH+set}" ]; then
      read -ra command <<<"sbatch --parsable $SBATCH${previous:+ --dependency=afterok:$previous} scripts/train.slurm"
    fi
    command+=("$recipe" "${options[@]}")
    if [ -n "$dry" ]; then
      printf '%q ' "${command[@]}"
      printf '\n'
      cost "$recipe" "${stage#*:}"
      previous=FIRST
    elif [ -n "${SBATCH+set}" ]; then
      previous=$("${command[@]}")
      echo "job $previous: $recipe"
    else
      "${command[@]}"
    fi
  done
}

main "$@"
