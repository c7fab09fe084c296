# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model that answers questions by itself, without a student.

  python -m scripts.evaluate --config=configs/run/answer_eval.py \
    --workdir=results/eval --config.model.path=results/rlvr/export \
    --config.data.path=held_out.jsonl

`:smoke` runs on a CPU.
"""

import ml_collections

from configs.data import prompts, world
from configs.model import tiny
from configs.run import teaching_eval


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = teaching_eval.get_config(variant)
  del config.student, config.roles.student
  del config.templates
  # Prompt for the answer, with {question}.
  config.template = prompts.get_templates().baseline
  for phase in ("probe", "baseline", "solve"):
    del config.sampling[phase]
  config.sampling.teach.max_completion_tokens = 2048
  if config.world.directory:
    config.model = tiny.get_config(world.STUDENT)
    config.template = world.get_templates().baseline
    config.sampling.teach.max_completion_tokens = 40
  return config
