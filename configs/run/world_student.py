# SPDX-License-Identifier: Apache-2.0
"""SFT of the small world's student, which `scripts/make_world.py` runs."""

import ml_collections

from configs.data import world
from configs.model import tiny
from configs.run import teacher_sft


def get_config() -> ml_collections.ConfigDict:
  config = teacher_sft.get_config("smoke")
  config.model = tiny.get_config(f"{world.DIRECTORY}/student_init")
  config.data.path = f"{world.DIRECTORY}/student_sft.jsonl"
  config.num_epochs = 3.0
  return config
