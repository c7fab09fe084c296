# SPDX-License-Identifier: Apache-2.0
"""Evaluates a teacher: compares its student with and without teaching.

  python -m scripts.evaluate --config=configs/run/teaching_eval.py \
    --workdir=results/eval --config.model.path=results/rcl/export \
    --config.data.path=held_out.jsonl

`:smoke` runs on a CPU.
"""

import ml_collections

from configs import mesh, rollout, sections
from configs.data import prompts, selection, world
from configs.model import frozen, hf, tiny
from configs.reward import teaching
from configs.run import teacher_rcl


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.recipe = "evaluation"  # Kind of run, which one script runs; fixed.
  config.seed = 7  # Seed of all random numbers.
  config.world = sections.get_world()
  config.model = frozen.get_config(
    "Arc-Intelligence/ATLAS-8B-Instruct", hf.NO_THINKING
  )
  config.student = frozen.get_config("Qwen/Qwen3-4B", hf.NO_THINKING)
  config.mesh = mesh.get_config()
  config.data = selection.get_config()
  config.sampler = sections.get_sampler()
  config.rollout = rollout.get_config()
  config.roles = sections.get_roles()
  config.templates = prompts.get_templates()
  config.sampling = teacher_rcl.get_sampling()
  config.math_verify = teaching.get_config().math_verify
  config.batch_size = 64  # Questions sampled at once.
  config.num_bootstrap = 2000  # Resamples for the 95 % intervals.

  if variant == "smoke":
    config.world.directory = world.DIRECTORY
    config.model = tiny.get_config(world.TEACHER)
    config.student = tiny.get_config(world.STUDENT)
    config.data.path = f"{world.DIRECTORY}/test.jsonl"
    config.templates = world.get_templates()
    config.rollout.dtype = "float32"
    config.sampling = teacher_rcl.get_world_sampling()
    config.batch_size = 128  # As many as teacher_rcl samples at once.
    config.sampler = dict(max_rows=128)
  elif variant != "full":
    raise ValueError(f"Unknown variant {variant!r}; there is :smoke.")
  # One baseline and one taught answer, so each question is one pair.
  config.sampling.baseline.group_size = 1
  config.sampling.teach.group_size = 1
  return config
