#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv-rollout: vLLM for what this machine has, our server, and no JAX
# of the trainer's. vLLM pins its own torch, so it lives apart.
#   bash scripts/install_rollout.sh [cpu|cuda|tpu]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh

detect_device() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null |
    grep -q GPU; then
    echo cuda
  elif compgen -G "/dev/accel*" >/dev/null; then
    echo tpu
  else
    echo cpu
  fi
}

device="${1:-$(detect_device)}"
pins="requirements/rollout-$device.txt"
if [[ ! -f "$pins" ]]; then
  echo "No rollout environment for '$device'; choose cpu, cuda or tpu." >&2
  exit 2
fi
environment=.venv-rollout
python="$environment/bin/python"

if ! cmp -s "$pins" "$environment/installed.txt"; then
  if [[ ! -x "$environment/bin/pip" ]]; then
    # It needs no JAX; CPU builds of torch may be missing for newer Pythons.
    base=$(find_python 3.11 2>/dev/null) || base=$(find_python) || exit 2
    "$base" -m venv --clear "$environment"
  fi
  echo "Installing vLLM for $device into $environment; this takes minutes."
  "$python" -m pip install -qq --disable-pip-version-check -r "$pins"
  if [[ "$device" == cpu ]]; then
    # Their builds do not match the CPU build of torch, and text needs none.
    "$python" -m pip uninstall -qq -y torchvision torchaudio torchcodec
  fi
fi

version=$(HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR PYTHONPATH=. \
  "$python" -c 'from rollout.server import engine_vllm; print(engine_vllm.VERSION)') ||
  {
    echo "vLLM is installed but does not start; see above. Delete" \
      "$environment and run this line again." >&2
    exit 2
  }
cp "$pins" "$environment/installed.txt"
echo "vLLM $version for $device is ready in $environment."
