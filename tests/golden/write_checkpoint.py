# SPDX-License-Identifier: Apache-2.0
"""Writes a golden checkpoint that later releases must still restore.

  python -m tests.golden.write_checkpoint

It writes `checkpoints/1` next to this file, and `checkpoints.json`, the SHA-256
of every array. Both are committed. Run it again only after an intended change
of the checkpoint format, and document how users migrate (see
`checkpoint_format.read` and docs/checkpoints.md).
"""

import hashlib
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp

from atlas_jax import checkpoint, checkpoint_format
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import train_state
from configs import optimizer as optimizers
from tests import tiny

DIRECTORY = pathlib.Path(__file__).parent / "checkpoints"
DIGESTS = DIRECTORY.with_suffix(".json")
HOST_STATE = {"ahead": [], "protocol": {"baselines": [["q0", [[5, 7]]]]}}
SETTINGS = {
  "identity": {"data": "golden", "optimizer": "adamw"},
  "keep": 1,
  "max_failed": 1,
  "allow_changed": "",
  "best_metric": "eval/loss",
  "best_mode": "min",
  "load_best": False,
}
_SIZES = {
  "vocab_size": 11,
  "hidden_size": 6,
  "intermediate_size": 10,
  "num_attention_heads": 2,
  "head_dim": 4,
}


def state() -> train_state.TrainState:
  """Returns a training state of zeros with a reference."""
  model = tiny.build("qwen3", **_SIZES)
  optimizer = train_optimizer.make_optimizer(
    lambda _: 1e-3, **optimizers.get_config()
  )
  params = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract_params
  )
  reference = jax.tree.map(jnp.copy, params)
  return train_state.create(
    params, optimizer, mesh=tiny.mesh(), reference=reference
  )


def digests(of: train_state.TrainState) -> dict[str, str]:
  """Returns the SHA-256 of every array, by name."""
  return {
    checkpoint_format.name(path): hashlib.sha256(
      jax.device_get(leaf).tobytes()
    ).hexdigest()
    for path, leaf in jax.tree.leaves_with_path(of)
  }


def main() -> None:
  """Replaces the golden checkpoint."""
  leaves, structure = jax.tree.flatten(state())
  filled = [
    # Values that differ between all elements and arrays.
    (jnp.arange(leaf.size).reshape(leaf.shape) + 1000 * i + 1).astype(
      leaf.dtype
    )
    for i, leaf in enumerate(leaves)
  ]
  filled = jax.tree.unflatten(structure, filled)
  shutil.rmtree(DIRECTORY, ignore_errors=True)
  # Orbax records the directory it writes to, so use a temporary one.
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory)
    with checkpoint.Checkpointer(path, **SETTINGS) as checkpointer:
      checkpointer.save(1, filled, {"eval/loss": 0.5}, HOST_STATE)
    shutil.copytree(path, DIRECTORY)
  DIGESTS.write_text(json.dumps(digests(filled), indent=2) + "\n", "utf-8")


if __name__ == "__main__":
  main()
