# SPDX-License-Identifier: Apache-2.0
"""The commands that `pip install` creates.

`atlas-train-sft` runs `python -m scripts.train_sft`, in any folder.
"""

import pathlib
import runpy
import sys

_ELSEWHERE = {"doctor": "atlas_jax.doctor"}


def main() -> None:
  """Runs the program that this command is named after."""
  name = pathlib.Path(sys.argv[0]).name.removeprefix("atlas-").replace("-", "_")
  module = _ELSEWHERE.get(name, f"scripts.{name}")
  runpy.run_module(module, run_name="__main__", alter_sys=True)
