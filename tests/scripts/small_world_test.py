# SPDX-License-Identifier: Apache-2.0
"""Tests the data of the small world."""

import json

from scripts import small_world


def test_held_out_problems_have_paraphrases_that_occur_nowhere(tmp_path):
  small_world.write_data(tmp_path, seed=0)
  rows = {
    name: [
      json.loads(line)
      for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    for name in ("questions", *small_world.HELD_OUT)
  }
  assert not any(row["paraphrase"] for row in rows["questions"])
  asked = {row["question"] for each in rows.values() for row in each}
  trained = (tmp_path / "student_sft.jsonl").read_text()
  for name, count in small_world.HELD_OUT.items():
    assert len(rows[name]) == count
    for row in rows[name]:
      assert row["paraphrase"] not in asked
      assert row["paraphrase"] not in trained
      assert row["paraphrase_answer"] not in ("", row["answer"])


def test_the_trained_models_have_the_tokenizer_of_the_world(tmp_path):
  small_world.ensure(str(tmp_path / "world"))
  made = tmp_path / "world/student_init/tokenizer.json"
  for role in ("student", "teacher"):
    trained = tmp_path / f"world/{role}/tokenizer.json"
    assert json.loads(trained.read_text()) == json.loads(made.read_text())
  assert [path.name for path in tmp_path.iterdir()] == ["world"]
