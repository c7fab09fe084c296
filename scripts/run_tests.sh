#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint, types and all tests, from nothing. Arguments go to pytest:
#   bash scripts/run_tests.sh -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh
ensure_environment trainer test parity lint
bash scripts/install_rollout.sh

.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/pyright --pythonpath .venv/bin/python

# Two workers share the cores; more threads in each only get in the way.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile \
  --no-loadscope-reorder "$@"
