# SPDX-License-Identifier: Apache-2.0
"""GRPO of a teacher that makes its student find the solution likely: R0.

  python -m scripts.train_grpo --config=configs/run/teacher_rlt.py \
    --workdir=results/rlt --config.model.path=results/sft/export \
    --config.data.path=questions.jsonl

The solution is the column `solution`, or else the answer. All else is that of
teacher_rcl.py. Made for 8 GPUs with 80 GB; not run on them yet. `:smoke` runs
on a CPU.
"""

import ml_collections

from configs.run import teacher_rcl


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = teacher_rcl.get_config(variant)
  config.reward.weights.teaching = 0.0
  config.reward.weights.rlt = 1.0
  return config
