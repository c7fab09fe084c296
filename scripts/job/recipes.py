# SPDX-License-Identifier: Apache-2.0
"""Values of `config.recipe` and the programs that run them."""

PROGRAMS = {
  "sft": "scripts.train_sft",
  "grpo": "scripts.train_grpo",
  "gkd": "scripts.train_gkd",
  "evaluation": "scripts.evaluate",
}
