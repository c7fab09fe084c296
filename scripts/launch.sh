#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on the first N devices:
#   bash scripts/launch.sh N RECIPE [OVERRIDES] [offload]
# For example: bash scripts/launch.sh 1 configs/run/teacher_sft.py:smoke
# Overrides are --config.KEY=VALUE and the names of docs/overrides.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh
ensure_environment trainer
exec .venv/bin/python -m scripts.launch "$@"
