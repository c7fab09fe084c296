# SPDX-License-Identifier: Apache-2.0
"""Creates a small world, in which the quickstart trains.

  python -m scripts.make_world --directory=.cache/world

Trains its student by SFT. With --notrain, it copies a trained student and a
trained teacher instead, as every recipe's `:smoke` variant does by itself.
"""

import json
import pathlib
import subprocess
import sys

from absl import flags

from atlas_jax import errors
from scripts import program, small_world

_DIRECTORY = flags.DEFINE_string(
  "directory", None, "Where to write it.", required=True
)
_TRAIN = flags.DEFINE_bool("train", True, "Whether to train its student.")
_EPOCHS = flags.DEFINE_integer(
  "epochs", None, "SFT epochs of the student; default: its config's."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all problems and weights.")


def main() -> None:
  """Creates missing parts of the world; `world.json` is written last."""
  directory = pathlib.Path(_DIRECTORY.value)
  if not _TRAIN.value:
    small_world.ensure(str(directory))
  elif not (directory / "world.json").exists():
    directory.mkdir(parents=True, exist_ok=True)
    small_world.write(directory, _SEED.value)
    _train_student(directory)
    facts = {"seed": _SEED.value, **small_world.SIZES, **small_world.HELD_OUT}
    (directory / "world.json").write_text(json.dumps(facts) + "\n")


def _train_student(directory: pathlib.Path) -> None:
  """Trains it with `scripts.train_sft`, which exports to its workdir."""
  workdir = directory / "student_run"
  command = [sys.executable, "-m", "scripts.train_sft"]
  options = [
    "--config=configs/run/world_student.py",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={directory}/student_init",
    f"--config.data.path={directory}/student_sft.jsonl",
    f"--config.seed={_SEED.value}",
  ]
  if _EPOCHS.value:
    options.append(f"--config.num_epochs={_EPOCHS.value}")
  code = subprocess.run([*command, *options], check=False).returncode
  if code:
    raise errors.ConfigError(
      "Training the student failed.",
      where=str(workdir),
      why=f"scripts.train_sft exited with code {code}; its errors are above.",
      fix="Fix the error it reports and run this command again.",
    )


if __name__ == "__main__":
  program.run(main)
