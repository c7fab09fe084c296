# SPDX-License-Identifier: Apache-2.0
"""GRPO of a teacher, rewarded by its student's solution likelihood (R0).

  python -m scripts.train_grpo --config=configs/run/teacher_rlt.py \
    --workdir=results/rlt --config.model.path=results/sft/export \
    --config.data.path=questions.jsonl

The solution is the column `solution`, or the answer if that is missing.
Everything else follows teacher_rcl.py. Sized for 8 GPUs with 80 GB; not run on
them yet. `:smoke` runs on a CPU.
"""

import ml_collections

from configs.run import teacher_rcl


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = teacher_rcl.get_config(variant)
  config.reward.weights.teaching = 0.0
  config.reward.weights.rlt = 1.0
  config.advantages.min_std = 0.0  # The reward has no part for brevity.
  return config
