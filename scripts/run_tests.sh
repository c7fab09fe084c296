#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint, types and all tests, from nothing. Other arguments go to pytest:
#   bash scripts/run_tests.sh [--python=3.11] [--quick] [--coverage] [-k losses]
# --python  uses that version, in an environment of its own (.venv-3.11)
# --quick   skips lint, slow tests, vLLM, comparisons with PyTorch, real models
# --coverage  reports the lines that no test runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python_version="" environment=.venv quick="" pytest=() requirements=(trainer test)
for argument in "$@"; do
  case "$argument" in
    --python=*)
      python_version="${argument#*=}"
      environment=".venv-$python_version"
      ;;
    --quick) quick=1 ;;
    --coverage)
      requirements+=(coverage)
      pytest+=(--cov --cov-report=term-missing:skip-covered)
      ;;
    *) pytest+=("$argument") ;;
  esac
done

source scripts/environment.sh
if [[ -n "$quick" ]]; then
  ensure_environment "${requirements[@]}"
  pytest+=(-m "not slow and not vllm and not real" --ignore-glob="*_parity_test.py"
    --ignore=tests/end_to_end)
else
  ensure_environment "${requirements[@]}" parity lint
  ensure_real
  bash scripts/install_rollout.sh
  "$environment/bin/ruff" check --quiet .
  "$environment/bin/ruff" format --check --quiet .
  "$environment/bin/pyright" --pythonpath "$environment/bin/python"
fi

# Two workers share the cores; more threads in each only get in the way.
export OMP_NUM_THREADS=1
exec "$environment/bin/python" -m pytest -q -n 2 --dist loadfile \
  --no-loadscope-reorder "${pytest[@]}"
