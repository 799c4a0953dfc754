#!/usr/bin/env bash
# Install a small SLURM (Debian's slurmctld, slurmd, slurm-client, munge) for the tests that run scripts/train.slurm on one machine.
#   bash scripts/install_slurm.sh        as root, on Debian or Ubuntu; where systemd runs, Debian starts their services
set -euo pipefail
if command -v slurmctld slurmd sbatch munged >/dev/null; then exit 0; fi
if [ $# -gt 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends -o DPkg::Lock::Timeout=120 slurmctld slurmd slurm-client munge >/dev/null
