#!/usr/bin/env bash
# HyperLLaVA-13B as the paper trains it, in two stages (--help explains, --dry-run prints commands, memory and hours).
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch/paper.sh" 13b "$@"
