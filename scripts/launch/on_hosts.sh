#!/usr/bin/env bash
# Start on_node.sh on every host of HOSTS by ssh, and end what is left when one is lost (scripts/train.sh --help has the rest).
#   HOSTS="a b" scripts/launch/on_hosts.sh PROGRAM [ARGUMENT ...]
# A host reads what to run from its standard input, so that no value shows in a list of processes, and takes the end of that input as a
# request to stop: whatever happens to this script or to the network, no rank stays behind.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
say() { echo "launcher: $*" >&3; }

carried() { # lines that set the variables which go to the hosts
  local name kept='(HF|NCCL|GLOO|TORCH|OMP|MKL|LLAVA_COLLAB|WANDB)_.*|PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV'
  while read -r name; do
    printf 'export %s=%q\n' "$name" "${!name}"
  done < <(compgen -e | grep -E "^($kept${CARRY:+|${CARRY// /|}})$")
}

part() { # NODE: lines that run a host's part
  local name
  printf 'cd %q\n' "$PWD"
  printf 'export LIFELINE=1 ADDRESSES=%q NODE=%q MEETING=%q PORT=%q RESTARTS=%q\n' \
    "${hosts[*]#*@}" "$1" "run-$$-$attempt" "${PORT:-29400}" "$restarts"
  for name in GPUS PYTHON; do
    if [ -n "${!name:-}" ]; then printf 'export %s=%q\n' "$name" "${!name}"; fi
  done
  printf 'exec %q' "$root/scripts/launch/on_node.sh"
  printf ' %q' "${program[@]}"
  echo
}

dry_run() {
  local node
  for node in "${!hosts[@]}"; do
    echo "ssh ${hosts[$node]} bash -s   # with these lines, after the variables carried from here, as its input:"
    part "$node" | sed 's/^/  /'
    ADDRESSES="${hosts[*]#*@}" NODE=$node MEETING="run-$$-0" "$root/scripts/launch/on_node.sh" "${program[@]}" | sed 's/^/  which runs: /'
  done
}

connect() { # HOST PIPE: ssh, alone with its own lifeline
  local other
  for other in "${lines[@]}"; do exec {other}>&-; done
  trap '' INT TERM HUP # a terminal sends Ctrl-C to ssh too, which has to bring the ranks' last words
  exec ssh -o BatchMode=yes -o ServerAliveInterval=15 "$1" bash -s <"$2" 2>&3
}

start() { # all hosts
  local node line
  lines=() sessions=()
  for node in "${!hosts[@]}"; do
    mkfifo "$pipes/$attempt-$node"
    exec {line}<>"$pipes/$attempt-$node"
    lines+=("$line")
    connect "${hosts[$node]}" "$pipes/$attempt-$node" &
    sessions+=($!)
    { carried; part "$node"; } >&"$line"
  done
}

tell() { # WORD to every host
  local line
  for line in "${lines[@]}"; do echo "$1" >&"$line"; done
}

# shellcheck disable=SC2329 # a trap calls it
stop() { # NUMBER of the signal
  if [ -n "$asked" ]; then
    tell end
  else
    asked=$1
    tell stop
  fi
}

watch_hosts() { # until all have left, filling `worst`; one that is lost, or has left with an error, takes the others along
  local node status gone=0 lost=''
  worst=0
  while ((gone < ${#hosts[@]})); do
    for node in "${!sessions[@]}"; do
      if kill -0 "${sessions[$node]}"; then continue; fi
      status=0
      wait "${sessions[$node]}" || status=$?
      unset "sessions[$node]"
      gone=$((gone + 1))
      if ((status > worst)); then worst=$status; fi
      if ((status == 0 || status == 75)); then continue; fi
      say "${hosts[$node]} left with code $status"
      if [ -z "$lost" ]; then
        lost=1
        sleep 3 # the others may be on their way out
        tell end
      fi
    done
    sleep 0.5 &
    wait $! || true
  done
}

main() { # a function, which bash reads whole: an edit of this file does not reach a run that is on
  local -a hosts program=("$@") lines=() sessions=()
  local restarts=${RESTARTS:-3} attempt=0 asked='' worst line pipes
  read -ra hosts <<<"${HOSTS:-}"
  if [ $# -eq 0 ] || ((${#hosts[@]} == 0)); then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
  fi
  if [ -n "${DRY_RUN:-}" ]; then
    dry_run
    exit 0
  fi
  exec 3>&2 2>/dev/null # bash would report an ssh that was killed
  pipes=$(mktemp -d)
  # shellcheck disable=SC2064 # the value of now: it is a local one
  trap "rm -rf '$pipes'" EXIT
  trap 'stop 2' INT
  trap 'stop 15' TERM HUP
  while :; do
    start
    watch_hosts
    for line in "${lines[@]}"; do exec {line}>&-; done
    # 255: ssh lost its host; 128 and more: torchrun was killed. on_node.sh says 200 and 201 where the same would happen again
    if [ -n "$asked" ] || ((worst < 128 || worst == 200 || worst == 201 || attempt >= restarts)); then break; fi
    attempt=$((attempt + 1))
    say "starting all hosts again ($attempt of $restarts)"
  done
  case "$worst" in
    75) exit $((${asked:-0} == 0 ? 75 : 128 + asked)) ;;
    200) exit 1 ;;
    201) exit 70 ;;
    *) exit "$worst" ;;
  esac
}

main "$@"
