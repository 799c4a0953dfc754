#!/usr/bin/env bash
# Train by a recipe with torchrun, on this machine or, with HOSTS, on many over ssh. Ranks that die are started again from the last checkpoint.
#
#   scripts/train.sh RECIPE [train.py options, e.g. --optim.lr 1e-4]
#   GPUS=8 HOSTS="node1 node2" scripts/train.sh RECIPE --run.out /shared/run
#
# Ctrl-C: every rank finishes its step, saves and leaves; a second Ctrl-C ends them at once.
# On many hosts this script can run on any machine that reaches them by ssh without a password (ssh-agent or a key); each needs this folder under
# this path (a shared file system, or copies), the same Python environment, and the run folder on a shared file system. Names in HOSTS (user@name
# too) must be known to the hosts themselves: the ranks call each other by them. A host that is lost ends the ranks of the others, and all
# start again, RESTARTS times. Variables whose names begin with HF_, NCCL_, GLOO_, TORCH_, OMP_, MKL_, LLAVA_COLLAB_, WANDB_, and PATH,
# LD_LIBRARY_PATH, PYTHONPATH, VIRTUAL_ENV and those named in CARRY="NAME ..." go to the hosts.
#
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/launch/options.sh
source "$root/scripts/launch/options.sh"
read_arguments "${BASH_SOURCE[0]}" "$@"
if [ -n "${HOSTS:-}" ]; then
  exec "$root/scripts/launch/on_hosts.sh" "${program[@]}"
fi
exec "$root/scripts/launch/on_node.sh" "${program[@]}"
