# SPDX-License-Identifier: Apache-2.0
"""GRPO of a model without a student, with a verifiable reward.

  python -m scripts.train_grpo --config=configs/run/rlvr.py \
    --workdir=results/rlvr --config.model.path=Qwen/Qwen3-4B \
    --config.data.path=questions.jsonl

Everything else follows teacher_rcl.py, including its variants.
Sized for 8 GPUs with 80 GB; not run on them yet. `:smoke` runs on a CPU.
"""

import ml_collections

from configs.data import prompts, world
from configs.model import tiny
from configs.run import teacher_rcl


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = teacher_rcl.get_config(variant)
  del config.student, config.roles.student
  del config.templates
  # Prompt for the answer, with {question}.
  config.template = prompts.get_templates().baseline
  for phase in ("probe", "baseline", "solve"):
    del config.sampling[phase]
  for key in ("num_baselines", "num_teachings"):
    del config.evaluation[key]
  config.sampling.teach.temperature = 1.0
  config.sampling.teach.max_completion_tokens = 2048
  config.reward.weights.teaching = 0.0
  config.reward.weights.exact = 1.0
  config.advantages.min_std = 0.0  # The reward has no part for brevity.
  if config.world.directory:
    config.model = tiny.get_config(world.STUDENT)
    config.template = world.get_templates().baseline
    config.sampling.teach.max_completion_tokens = 40
  return config
