# SPDX-License-Identifier: Apache-2.0
"""Reading, mixing and holding out data, from the config to batches."""

import json

import pytest

from atlas_jax import errors
from atlas_jax.data import sets
from tests import fakes

_ROWS = [
  {"question": f"What is {i} + {i}?", "solution": f"It is {2 * i}."}
  for i in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fakes.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _write(tmp_path, rows=_ROWS, name="data.jsonl"):
  path = tmp_path / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _selection(path, **changes):
  settings = {
    "format": "auto",
    "formats": {},
    "weights": (),
    "max_rows": 0,
    "max_bad_rows": 0,
  }
  return sets.Selection(path=path, **{**settings, **changes})


def _conversations(
  tokenizer,
  tmp_path,
  path,
  *,
  batch_size=4,
  held_out_path="",
  fraction=0.2,
  packed=False,
  **changes,
):
  return sets.conversations(
    tokenizer,
    data=_selection(path, **changes),
    held_out=sets.HeldOut(path=held_out_path, fraction=fraction),
    layout=sets.Layout(length=128, packed=packed, too_long="error"),
    batch_size=batch_size,
    seed=0,
    workdir=tmp_path,
  )


def _questions(tmp_path, path, *, held_out_path="", fraction=0.0, **changes):
  data, held_out = sets.questions(
    _selection(path, **changes),
    sets.HeldOut(path=held_out_path, fraction=fraction),
    batch_size=1,
    seed=0,
    workdir=tmp_path,
  )
  return data, held_out


def _texts(tokenizer, data, *, counted=False):
  """Returns the text of each row of an epoch, or of its counted tokens."""
  texts = []
  for step in range(data.num_batches_per_epoch):
    batch = data.batch(step)
    real = batch["loss_mask"] if counted else batch["segment_ids"] > 0
    texts += [
      tokenizer.decode(row[kept])
      for row, kept in zip(batch["token_ids"], real, strict=True)
      if kept.any()
    ]
  return texts


def test_only_assistant_turns_are_targets(tokenizer, tmp_path):
  path = _write(tmp_path)
  answers = {f"It is {2 * i}.<|im_end|>" for i in range(20)}
  found = []
  for data in _conversations(
    tokenizer, tmp_path, path, batch_size=1, packed=True
  ):
    for text in _texts(tokenizer, data, counted=True):
      found += [part + "<|im_end|>" for part in text.split("<|im_end|>")[:-1]]
  assert set(found) == answers
  assert len(found) == len(answers)


def test_all_rows_of_a_problem_are_in_one_split(tokenizer, tmp_path):
  again = [
    {**row, "question": row["question"].upper(), "solution": "As before."}
    for row in _ROWS
  ]
  path = f"{_write(tmp_path)},{_write(tmp_path, again, 'again.jsonl')}"
  train_set, eval_set = _conversations(tokenizer, tmp_path, path, batch_size=1)
  sides = [
    [
      text.partition("user\n")[2].partition("<")[0].lower()
      for text in _texts(tokenizer, data)
    ]
    for data in (train_set, eval_set)
  ]
  assert [len(side) for side in sides] == [32, 8]
  assert not set(sides[0]) & set(sides[1])


def test_separate_file_is_held_out_completely(tokenizer, tmp_path):
  held_out = _write(tmp_path, _ROWS[:4], "held_out.jsonl")
  train_set, eval_set = _conversations(
    tokenizer,
    tmp_path,
    _write(tmp_path),
    held_out_path=held_out,
    fraction=0.0,
  )
  train, evaluated = (_texts(tokenizer, d) for d in (train_set, eval_set))
  assert len(evaluated) == 4
  assert len(train) == 16
  assert not set(train) & set(evaluated)
  with pytest.raises(
    errors.DataError, match="problems of 20 rows are held out"
  ):
    _questions(
      tmp_path, _write(tmp_path), held_out_path=_write(tmp_path, name="b.jsonl")
    )


def test_held_out_requires_exactly_one_setting(tokenizer, tmp_path):
  with pytest.raises(errors.ConfigError, match="Only one of held_out"):
    sets.HeldOut(path="held_out.jsonl", fraction=0.2)
  with pytest.raises(errors.ConfigError, match="must be set"):
    _conversations(tokenizer, tmp_path, _write(tmp_path), fraction=0.0)


def test_weights_mix_the_sets(tokenizer, tmp_path):
  few = [{"question": f"few {i}?", "solution": "s"} for i in range(5)]
  path = f"{_write(tmp_path)}, {_write(tmp_path, few, 'few.jsonl')}"
  train_set, _ = _conversations(
    tokenizer, tmp_path, path, batch_size=1, weights=(1.0, 3.0)
  )
  texts = _texts(tokenizer, train_set)
  assert len(texts) == 20
  assert sum("few" in text for text in texts) == 15
  data, held_out = _questions(tmp_path, path, weights=(1.0, 3.0))
  assert not held_out
  names = [data.batch(step)[0].row_id for step in range(25)]
  assert sum(name.startswith("2/few:") for name in names) == 19
  plain, _ = _questions(tmp_path, path)
  assert plain.fingerprint() != data.fingerprint()
  with pytest.raises(errors.ConfigError, match="weights must be positive"):
    _questions(tmp_path, path, weights=(1.0,))


def test_each_dataset_has_its_format(tmp_path):
  gsm8k = [{"question": "q", "answer": "So.\n#### 4"}]
  path = f"{_write(tmp_path)},{_write(tmp_path, gsm8k, 'g.jsonl')}"
  found = sets.all_questions(
    _selection(path, format="default,gsm8k"), workdir=tmp_path
  )
  assert [question.answer for question in found[-2:]] == ["It is 38.", "4"]
  with pytest.raises(errors.ConfigError, match="name 1 or 1 formats, got 2"):
    sets.all_questions(
      _selection(_write(tmp_path), format="default,gsm8k"), workdir=tmp_path
    )


def test_all_questions_keeps_order_and_limits_rows(tmp_path):
  path = _write(tmp_path)
  found = sets.all_questions(_selection(path, max_rows=3), workdir=tmp_path)
  assert [question.row_id for question in found] == [
    f"data:{line}" for line in (1, 2, 3)
  ]


def test_invalid_rows_are_listed_and_the_rest_trains(tokenizer, tmp_path):
  path = tmp_path / "data.jsonl"
  lines = [json.dumps(row).encode() for row in _ROWS]
  lines[3:3] = [b'{"question": "\xff"}', b'{"question": "q"}']
  lines[9:9] = [b'{"messages": [{"role": "user", "content": "q"}]}']
  path.write_bytes(b"\n".join(lines) + b"\n")
  train_set, eval_set = _conversations(
    tokenizer, tmp_path, str(path), batch_size=1, max_bad_rows=3
  )
  assert sum(len(_texts(tokenizer, d)) for d in (train_set, eval_set)) == 20
  listed = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  entries = [json.loads(line) for line in listed]
  assert [entry["line"] for entry in entries] == [4, 5, 10]
  for entry, why in zip(
    entries,
    ("UnicodeDecodeError", "No known format", "assistant"),
    strict=True,
  ):
    assert why in entry["reason"]
  with pytest.raises(errors.DataError, match="max_bad_rows") as info:
    _conversations(tokenizer, tmp_path, str(path), max_bad_rows=2)
  assert info.value.exit_code == 3


def test_conversations_without_an_answer_are_quarantined(tmp_path):
  asked = [{"role": "user", "content": "2+2?"}]
  answered = [*asked, {"role": "assistant", "content": "4"}]
  rows = [{"messages": asked}, {"messages": answered}, {"messages": answered}]
  path = _write(tmp_path, rows)
  data = _selection(path, max_bad_rows=1)
  found = sets.all_questions(data, workdir=tmp_path)
  assert [(q.question, q.answer) for q in found] == [("2+2?", "4")] * 2
  (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  assert json.loads(line)["line"] == 1
  assert "has no answer" in json.loads(line)["reason"]


def test_reasons_for_left_out_rows_are_reported(tmp_path):
  rows = [{"question": "q", "answer": "So.", "level": i} for i in range(4)]
  fields = {"like": "gsm8k", "keep": {"level": (1, 2)}}
  path = tmp_path / "data.jsonl"
  path.write_text(
    "".join(json.dumps(row) + "\n" for row in rows) + "[]\n" + '{"ques'
  )
  with pytest.raises(errors.DataError, match="All rows are left out") as info:
    sets.all_questions(
      _selection(
        str(path), format="mine", formats={"mine": fields}, max_bad_rows=1
      ),
      workdir=tmp_path,
    )
  for reason in (
    "2 filtered by level",
    "2 without a match of answer_pattern",
    "1 quarantined",
    "1 unfinished last line",
  ):
    assert reason in info.value.why


def test_empty_missing_or_too_little_data_is_rejected(tokenizer, tmp_path):
  with pytest.raises(errors.DataError, match=r"none\.jsonl"):
    _conversations(tokenizer, tmp_path, str(tmp_path / "none.jsonl"))
  with pytest.raises(errors.DataError, match="empty"):
    _conversations(tokenizer, tmp_path, _write(tmp_path, []))
  with pytest.raises(errors.DataError, match="distinct problems"):
    _conversations(tokenizer, tmp_path, _write(tmp_path, _ROWS[:1]))
  no_solution = [{"question": "a", "hint": "b"}]
  with pytest.raises(errors.DataError, match="question, hint"):
    _conversations(tokenizer, tmp_path, _write(tmp_path, no_solution))


def test_fewer_rows_than_a_batch_train_in_one_step(tokenizer, tmp_path, caplog):
  caplog.set_level("WARNING")
  train_set, _ = _conversations(
    tokenizer, tmp_path, _write(tmp_path), batch_size=64
  )
  assert train_set.num_batches_per_epoch == 1
  assert len(_texts(tokenizer, train_set)) == 16
  assert "16 rows for batches of batch.size=64" in caplog.text
  pairs, _ = sets.completions(
    tokenizer,
    data=_selection(_write(tmp_path)),
    held_out=sets.HeldOut(path="", fraction=0.2),
    layout=sets.Layout(length=128, packed=True, too_long="error"),
    max_new_tokens=0,
    batch_size=64,
    seed=0,
    workdir=tmp_path,
  )
  assert len(pairs.batch(0)) == 16
  assert "Reduce --config.batch.num_prompts" in caplog.text


def test_duplicate_row_id_is_rejected(tmp_path):
  row = {"question": "q", "answer": "a", "id": "x"}
  with pytest.raises(errors.DataError, match="'x'"):
    sets.all_questions(
      _selection(_write(tmp_path, [row] * 2)), workdir=tmp_path
    )
