#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts rollout servers on the first N_SERVERS devices, trains on the next
# N_TRAIN devices, and then stops the servers:
#   bash scripts/launch_with_server.sh N_SERVERS N_TRAIN RECIPE \
#     [OVERRIDES] [offload]
# For example, on a CPU:
#   bash scripts/launch_with_server.sh 1 1 configs/run/teacher_rcl.py:smoke \
#     report_to=null max_steps=4 eval_steps=1
# Overrides are --config.KEY=VALUE, the names of docs/overrides.md, and
# --rollout=vllm|jax (default: vLLM if scripts/install_rollout.sh was run).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh
ensure_environment trainer
exec .venv/bin/python -m scripts.launch --num_servers="${1:-}" "${@:2}"
