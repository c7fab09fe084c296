# SPDX-License-Identifier: Apache-2.0
"""Rows are printed as each recipe trains on them, without a model."""

import json

import pytest

from atlas_jax import chat
from configs.run import rlvr, teacher_gkd, teacher_rcl, teacher_sft
from scripts.job import show_samples
from tests import fakes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("samples")
  fakes.write_tokenizer(directory / "model")
  rows = [{"question": f"{i} + {i}?", "answer": 2 * i} for i in range(1, 6)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (directory / "rows.jsonl").write_text(text)
  return directory


@pytest.mark.parametrize(
  ("recipe", "start", "end"),
  [
    (teacher_sft, "4 + 4?", "[[8<|im_end|>]]\n"),
    (teacher_gkd, "4 + 4?", "[[8<|im_end|>]]\n"),
    (rlvr, "4 + 4?", "<|im_start|>assistant\n[[...]]\nanswer: 8"),
    (teacher_rcl, "plan", "<|im_start|>assistant\n[[...]]\nanswer: 8"),
  ],
)
def test_rows_are_rendered_as_the_recipe_uses_them(
  files, tmp_path, recipe, start, end
):
  config = recipe.get_config()
  config.data.path = str(files / "rows.jsonl")
  tokenizer = chat.load_tokenizer(files / "model")
  found = list(show_samples.of_config(config, tokenizer, 4, tmp_path))
  assert len(found) == 4
  _, text = found[-1]
  assert start in text
  assert text.endswith(end)
