# SPDX-License-Identifier: Apache-2.0
"""Makes the small world in which every recipe's `:smoke` variant runs.

  python -m scripts.make_world --directory=.cache/world

Word problems with checkable answers, a tokenizer, a student trained on the
spot, and an untrained teacher, all in the formats of the real thing. With
`--teacher`, a teacher warmed up by SFT as well.
"""

import json
import pathlib
import subprocess
import sys

from absl import flags

from atlas_jax import errors
from configs.data import world
from scripts import program, small_world

_DIRECTORY = flags.DEFINE_string("directory", world.DIRECTORY, "Where it goes.")
_TEACHER = flags.DEFINE_bool("teacher", False, "Warms a teacher up as well.")
_EPOCHS = flags.DEFINE_integer("epochs", None, "SFT epochs of each role.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides every problem and weight.")


def main() -> None:
  """Makes whatever of the world is not there yet; `world.json` comes last."""
  directory = pathlib.Path(_DIRECTORY.value)
  if not (directory / "world.json").exists():
    _make(directory)
  if _TEACHER.value and not (directory / "teacher_run/export").exists():
    _train(directory, "teacher_sft.py:smoke", "teacher")


def _make(directory: pathlib.Path) -> None:
  """Makes the data, the tokenizer and the student."""
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
  """Trains a role by the ordinary script; its export stays in the workdir."""
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
      f"The {role} could not be trained.",
      where=str(workdir),
      why=f"scripts.train_sft ended with code {code}; see above.",
      fix="Mend what it reports and run this again.",
    )


if __name__ == "__main__":
  program.run(main)
