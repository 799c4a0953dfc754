#!/usr/bin/env bash
# This node's part of a run: torchrun, with a rank for each GPU. scripts/train.sh and scripts/train.slurm start it on every node.
#   [VARIABLE=value ...] scripts/launch/on_node.sh PROGRAM [ARGUMENT ...]     PROGRAM: a Python file, or -m and a module
# Variables: GPUS     ranks to start (default: every GPU of this node; where there is none, one rank on the CPU)
#            RESTARTS how often torchrun starts all ranks again when one dies (default 3)
#            ADDRESSES, NODE, PORT, MEETING   all nodes ("10.0.0.1 10.0.0.2"), which of them this is (0, 1 ...), the port where they meet on
#                     the first, and a name that no other meeting there has (default: a node alone)
#            CONTROL  folder through which launcher and ranks talk (llava_collab/training/stop.py; default: a new one)
#            LIFELINE set: stop when standard input ends; the words "stop" and "end" there do what one and two Ctrl-C do
#            DRY_RUN  set: print the command
# SIGTERM, SIGINT, SIGHUP, SIGUSR1: the ranks finish their step, save and leave; a second SIGINT ends them at once.
# Exit codes: 0 finished, 1 error, 70 ranks died too often, 75 deadline (run it again), 128 + N: stopped by signal N after saving, or torchrun
# was killed by it. One node of many gives 75 for a signal, 200 for an error, 201 for 70: the highest code of all nodes tells what to do.
# shellcheck disable=SC2329 # functions that only a trap calls
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
say() { echo "launcher: $*" >&3; }

count_gpus() { # of this process: nvidia-smi does not know what CUDA_VISIBLE_DEVICES hides
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    nvidia-smi --list-gpus 2>/dev/null | wc -l || true
  fi
}

choose_command() { # PROGRAM [ARGUMENT ...]: fills `command`
  local gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-$(count_gpus)}} restarts=${RESTARTS:-3} node=${NODE:-0} name first=false
  for name in gpus restarts node; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || { echo "error: ${name^^} must be a number, not '${!name}'" >&2; exit 2; }
  done
  if ((gpus == 0)); then gpus=1; fi
  if ((node == 0)); then first=true; fi
  # torchrun itself is to be deaf to SIGTERM: it would kill its ranks 30 s later, saved or not.
  command=("${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "$gpus" --max-restarts "$restarts" --signals-to-handle SIGINT)
  if ((${#addresses[@]} > 1)); then
    command+=(--nnodes "${#addresses[@]}" --rdzv-backend c10d --rdzv-endpoint "${addresses[0]}:${PORT:-29400}")
    command+=(--rdzv-id "${MEETING:-llava-collab}" --rdzv-conf "is_host=$first" --local-addr "${addresses[$node]}")
  else
    command+=(--standalone)
  fi
  command+=("$@")
}

relay() { # what reads our output may go first (a terminal, ssh): the ranks must be able to write until they have saved
  trap '' HUP INT PIPE QUIT TERM USR1
  cat 2>/dev/null || cat >/dev/null
}

start_agent() {
  # A store that torchrun shares with its ranks keeps the addresses of ranks that died, and the next ones call those (pytorch/pytorch#135712).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  (
    trap '' HUP QUIT USR1 USR2 TERM
    exec env "$mark" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" setsid "${command[@]}" </dev/null
  ) &
  agent=$!
  exec 3>&2 2>/dev/null # bash would report what end_all kills
}

end_all() { # what this launcher started, wherever its parents went
  local -a left
  while mapfile -t left < <(grep -lszx -F -- "$mark" /proc/[0-9]*/environ | cut -d/ -f3) && ((${#left[@]})); do
    kill -KILL "${left[@]}" || true
    sleep 0.1
  done
}

stop() { # NUMBER of the signal
  if [ -z "$asked" ]; then
    asked=$1
    touch "$control/stop"
    say "stopping: the ranks finish their step and save"
  elif [ "$1" = 2 ]; then
    say "ending all ranks"
    end_all
  fi
}

listen() { # to the lifeline
  local word
  while read -r word; do
    if [ "$word" = end ]; then kill -USR2 $$; else kill -TERM $$; fi
  done
  kill -TERM $$
}

wait_for_agent() { # fills `status`: what torchrun left with
  while kill -0 "$agent"; do
    if [ -e "$control/failed" ]; then
      sleep 1 # the other ranks say what they met
      end_all
    fi
    sleep 0.5 &
    wait $! || true # a trapped signal ends this wait
  done
  status=0
  wait "$agent" || status=$?
  end_all
}

judge() { # turns `status` into what this script leaves with
  if [ -e "$control/failed" ]; then
    status=1
  elif [ "$status" = 0 ]; then
    status=$(cat "$control"/code-* | sort -n | tail -1)
    status=${status:-0}
    if [ -n "$asked" ] && [ "$status" != 0 ]; then status=$((128 + asked)); fi
  elif ((status < 128)); then
    status=70
  fi
  if ((${#addresses[@]} < 2)); then return; fi
  case "$status" in
    1) status=200 ;;
    70) status=201 ;;
    129 | 130 | 138 | 143) status=75 ;;
  esac
}

main() { # a function, which bash reads whole: an edit of this file does not reach a run that is on
  case "${1:---help}" in -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
  local asked='' agent control mark status lifeline=''
  local -a addresses command
  read -ra addresses <<<"${ADDRESSES:-}"
  choose_command "$@"
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
  fi
  control=${CONTROL:-$(mktemp -d "${TMPDIR:-/tmp}/llava-collab.XXXXXX")}
  mark="LLAVA_COLLAB_LAUNCH=$control"
  mkdir -p "$control"
  rm -f "$control"/{stop,failed,code-*}
  exec > >(relay) 2> >(relay >&2)
  trap '' PIPE
  trap 'stop 1' HUP
  trap 'stop 2' INT
  trap 'stop 10' USR1
  trap 'stop 15' TERM
  trap end_all USR2
  start_agent
  if [ -n "${LIFELINE:-}" ]; then
    listen <&0 >/dev/null &
    lifeline=$!
  fi
  wait_for_agent
  judge
  if [ -n "$lifeline" ]; then kill "$lifeline" || true; fi
  rm -f "$control"/{stop,failed,code-*}
  rmdir "$control" || true
  exit "$status"
}

main "$@"
