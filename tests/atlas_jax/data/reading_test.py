# SPDX-License-Identifier: Apache-2.0
"""Everyday data is recognized, mapped, shown and, if it is wrong, explained."""

import gzip
import json
import pathlib
import re

import pyarrow
from pyarrow import parquet
import pytest

from atlas_jax import errors
from atlas_jax.data import formats, reading, rows, sets
from tests import fakes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fakes.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _write(tmp_path, rows):
  path = tmp_path / "data.jsonl"
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
  return reading.Selection(path=path, **{**settings, **changes})


_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
_SHORT = (
  "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n"
)
_LONG = _SHORT.replace("2 + 2?", "Add.\n\n2, 2")
# Name and content of a file as other tools write it, the name of its format,
# its rows as they are trained, and its first question with the answer.
_EVERYDAY = {
  "alpaca": (
    "alpaca.json",
    json.dumps(
      [
        {"instruction": "2 + 2?", "input": "", "output": "4", "text": "Below"},
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "Is"},
      ],
      indent=4,
    ),
    [_SHORT, _LONG],
    ("2 + 2?", "4"),
  ),
  "sharegpt": (
    "chats.jsonl.gz",
    json.dumps(
      {
        "id": "x_0",
        "conversations": [
          {"from": "system", "value": "Be brief."},
          {"from": "human", "value": "2 + 2?"},
          {"from": "gpt", "value": "4"},
        ],
      }
    ),
    [_SYSTEM + _SHORT],
    ("System: Be brief.\n\nUser: 2 + 2?", "4"),
  ),
  "messages": (
    "chats.parquet",
    [
      {
        "prompt": "2 + 2?",
        "messages": [
          {"role": "user", "content": "2 + 2?"},
          {"role": "assistant", "content": "4"},
        ],
      }
    ],
    [_SHORT],
    ("2 + 2?", "4"),
  ),
  "default": (
    "exam.csv",
    "\ufeffid,question,answer,context\r\n"
    '1,2 + 2?,4,\r\n2,Add.,4,"2, 2"\r\n3,"Add.\n\n2, 2",4,\r\n',
    [_SHORT, _LONG, _LONG],
    ("2 + 2?", "4"),
  ),
  "prompt_completion": (
    "pairs.tsv.zst",
    "system\tprompt\tcompletion\nBe brief.\t2 + 2?\t4\n",
    [_SYSTEM + _SHORT],
    ("2 + 2?", "4"),
  ),
  "text": (
    "texts.jsonl.zst",
    json.dumps({"text": "2 + 2\nis 4.", "url": "-"}) + "\n",
    ["2[[ + 2\nis 4.<|im_end|>]]"],
    None,
  ),
}


def _write_everyday(tmp_path, name):
  file, content, *_ = _EVERYDAY[name]
  path = tmp_path / file
  if file.endswith(".parquet"):
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
  elif file.endswith(".gz"):
    path.write_bytes(gzip.compress(content.encode()))
  elif file.endswith(".zst"):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
      out.write(content.encode())
  else:
    path.write_text(content, newline="")
  return str(path)


def _samples(tokenizer, tmp_path, path, *, with_prompt=False, **changes):
  found = sets.samples(
    tokenizer,
    _selection(path, **changes),
    with_prompt=with_prompt,
    workdir=tmp_path,
  )
  return [text.partition(":\n")[2] for _, text in found]


@pytest.mark.parametrize("name", _EVERYDAY)
def test_everyday_data_is_recognized(tokenizer, tmp_path, name, caplog):
  caplog.set_level("INFO")
  _, _, expected, asked = _EVERYDAY[name]
  path = _write_everyday(tmp_path, name)
  for fmt in ("auto", name):
    assert _samples(tokenizer, tmp_path, path, format=fmt) == expected
  # What was recognized is logged once for each reading, with one sample.
  assert caplog.text.count(f"rows of {path} in format {name} (") == 2
  assert caplog.text.count(expected[0]) == 2
  if asked is None:
    with pytest.raises(errors.DataError, match="no question"):
      sets.all_questions(_selection(path), workdir=tmp_path)
    with pytest.raises(errors.DataError, match="no prompt"):
      _samples(tokenizer, tmp_path, path, with_prompt=True)
    return
  first, *_ = sets.all_questions(_selection(path), workdir=tmp_path)
  assert (first.question, first.answer) == asked


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (
      {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "completion": [{"role": "assistant", "content": "4"}],
      },
      _SHORT,
    ),
    ({"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": 4}, _SHORT),
    ({"system": "Be brief.", "question": "2 + 2?", "answer": "4"}, None),
  ],
)
def test_turns_of_a_prompt_are_completed(tokenizer, tmp_path, row, expected):
  path = _write(tmp_path, [row])
  assert _samples(tokenizer, tmp_path, path) == [expected or _SYSTEM + _SHORT]
  (question,) = sets.all_questions(_selection(path), workdir=tmp_path)
  assert (question.question, question.answer) == ("2 + 2?", "4")


def test_the_last_turn_alone_is_marked_with_a_prompt(tokenizer, tmp_path):
  turns = [
    {"role": role, "content": content}
    for role, content in zip(
      ("user", "assistant") * 2, ("2 + 2?", "4", "3 + 3?", "6"), strict=True
    )
  ]
  path = _write(tmp_path, [{"messages": turns}])
  whole, last = (
    _samples(tokenizer, tmp_path, path, with_prompt=with_prompt)[0]
    for with_prompt in (False, True)
  )
  assert whole.count("[[") == 2
  assert last == whole.replace("[[4<|im_end|>]]", "4<|im_end|>")


def test_rows_of_several_formats_may_be_in_one_file(
  tokenizer, tmp_path, caplog
):
  caplog.set_level("INFO")
  rows = [{"question": "2 + 2?", "answer": "4"}, {"text": "4 5"}]
  path = _write(tmp_path, rows)
  assert _samples(tokenizer, tmp_path, path) == [_SHORT, "4[[ 5<|im_end|>]]"]
  assert "in format default, text (" in caplog.text


def test_columns_are_mapped_by_their_names(tokenizer, tmp_path, caplog):
  caplog.set_level("INFO")
  path = tmp_path / "exam.csv"
  path.write_text("Task,Result,messages\n2 + 2?,4,none\n")
  columns = {"question": "Task", "answer": "Result"}
  found = _samples(tokenizer, tmp_path, str(path), columns=columns)
  assert found == [_SHORT]
  assert "(question: Task, solution: Result, answer: Result)" in caplog.text


@pytest.mark.parametrize(
  ("content", "columns", "what", "why", "fix"),
  [
    ("", {}, "empty", "Rows left out: none", "completely"),
    ("question,answer\n", {}, "empty", "none", "completely"),
    (
      "Task,Result\n1,2\n",
      {},
      "No known format has the columns",
      "columns: Task, Result.",
      "--config.data.columns.question=COLUMN",
    ),
    (
      "Task,Result\n1,2\n",
      {"question": "task", "answer": "Result"},
      "Missing column: task",
      "columns: Task, Result.",
      "--config.data.columns.question",
    ),
    ("question,answer\n1\n", {}, "Malformed", "1 values for 2", "quote"),
  ],
)
def test_wrong_tables_are_explained(
  tokenizer, tmp_path, content, columns, what, why, fix
):
  path = tmp_path / "exam.csv"
  path.write_text(content)
  for max_bad_rows in (0, 10):
    with pytest.raises(errors.DataError, match=what) as info:
      _samples(
        tokenizer,
        tmp_path,
        str(path),
        columns=columns,
        max_bad_rows=max_bad_rows,
      )
    assert why in info.value.why
    assert fix in info.value.fix


def test_a_long_sample_is_shortened_in_the_log():
  text = "".join(map(str, range(1000)))
  short = reading.shortened(text, 100)
  assert len(short) < 140
  assert short.startswith(text[:66])
  assert short.endswith(text[-33:])
  assert "2790 more characters" in short
  assert reading.shortened(text, len(text)) == text


def test_the_examples_of_the_documentation_have_their_formats():
  text = (pathlib.Path(__file__).parents[3] / "docs/data.md").read_text()
  found = re.findall(r"### (\w+)\n[^#]*?```json\n(.*?)\n```", text, re.DOTALL)
  assert {name for name, _ in found} == set(_EVERYDAY)
  for name, line in found:
    row = rows.Row("docs/data.md", 1, "data", json.loads(line))
    assert formats.recognize(row) == name
