# SPDX-License-Identifier: Apache-2.0
"""Creates the small world in which every recipe's `:smoke` variant runs.

  python -m scripts.make_world --directory=.cache/world

It has word problems with checkable answers, a tokenizer, a student trained by
SFT and an untrained teacher, in the formats of real data and models. With
`--teacher`, the teacher is trained by SFT too.
"""

import json
import pathlib
import subprocess
import sys

from absl import flags

from atlas_jax import errors
from configs.data import world
from scripts import program, small_world

_DIRECTORY = flags.DEFINE_string(
  "directory", world.DIRECTORY, "Where to write it."
)
_TEACHER = flags.DEFINE_bool(
  "teacher", False, "Whether to train the teacher by SFT too."
)
_EPOCHS = flags.DEFINE_integer(
  "epochs", None, "SFT epochs of each model; default: its config's."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all problems and weights.")


def main() -> None:
  """Creates missing parts of the world; `world.json` is written last."""
  directory = pathlib.Path(_DIRECTORY.value)
  if not (directory / "world.json").exists():
    _make(directory)
  if _TEACHER.value and not (directory / "teacher_run/export").exists():
    _train(directory, "teacher_sft.py:smoke", "teacher")


def _make(directory: pathlib.Path) -> None:
  """Writes the data and the tokenizer, and trains the student."""
  directory.mkdir(parents=True, exist_ok=True)
  texts = small_world.write_data(directory, _SEED.value)
  tokenizer = small_world.make_tokenizer(texts)
  small_world.write_model(
    directory / "student_init",
    tokenizer,
    "qwen2",
    num_layers=2,
    width=128,
    seed=_SEED.value,
  )
  small_world.write_model(
    directory / "teacher_init",
    tokenizer,
    "qwen3",
    num_layers=3,
    width=128,
    seed=_SEED.value,
  )
  _train(directory, "world_student.py", "student")
  facts = {"seed": _SEED.value, **small_world.SIZES, **small_world.HELD_OUT}
  (directory / "world.json").write_text(json.dumps(facts) + "\n")


def _train(directory: pathlib.Path, recipe: str, role: str) -> None:
  """Trains a role with `scripts.train_sft`, which exports to its workdir."""
  workdir = directory / f"{role}_run"
  command = [sys.executable, "-m", "scripts.train_sft"]
  options = [
    f"--config=configs/run/{recipe}",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={directory}/{role}_init",
    f"--config.data.path={directory}/{role}_sft.jsonl",
    f"--config.seed={_SEED.value}",
  ]
  if _EPOCHS.value:
    options.append(f"--config.num_epochs={_EPOCHS.value}")
  code = subprocess.run([*command, *options], check=False).returncode
  if code:
    raise errors.ConfigError(
      f"Training the {role} failed.",
      where=str(workdir),
      why=f"scripts.train_sft exited with code {code}; its errors are above.",
      fix="Fix the error it reports and run this command again.",
    )


if __name__ == "__main__":
  program.run(main)
