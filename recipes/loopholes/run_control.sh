#!/usr/bin/env bash
# Usage: run_control.sh NAME [verl overrides]      NAME: a file in config/
set -euo pipefail
name=${1:?usage: run_control.sh NAME [verl overrides]; NAME is a file in config/}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$(realpath -m "${DATA:-outputs/loopholes}")

vgr prepare loopholes --to "$data" --seed "${SEED:-0}"

set -x
python3 -m verl.trainer.main_ppo \
    --config-path "$here/config" \
    --config-name "$name" \
    grad_routing.environment.dir="$data" \
    "$@"
