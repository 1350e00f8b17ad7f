#!/usr/bin/env bash
# Usage: MODEL=/path/to/Qwen3-4B run.sh SIZE PRESET [verl overrides]      SIZE: 0.6B, 1.7B or 4B
set -euo pipefail
size=${1:?usage: MODEL=FOLDER run.sh SIZE PRESET [verl overrides]; SIZE is 0.6B, 1.7B or 4B}
preset=${2:?usage: MODEL=FOLDER run.sh SIZE PRESET [verl overrides]; PRESET: see vgr list presets}
shift 2
model=$(realpath "${MODEL:?set MODEL to the folder with the weights of Qwen3-$size}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$(realpath -m "${DATA:-outputs/code_loopholes}")

vgr prepare code_loopholes --to "$data" --seed "${SEED:-0}"

set -x
python3 -m verl.trainer.main_ppo \
    --config-path "$here/config" \
    --config-name "$size" \
    grad_routing="$preset" \
    actor_rollout_ref.model.path="$model" \
    grad_routing.environment.dir="$data" \
    "$@"
