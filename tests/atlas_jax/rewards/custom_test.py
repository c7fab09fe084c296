# SPDX-License-Identifier: Apache-2.0
"""Tests that failures of user-defined reward functions are contained."""

import pytest

from atlas_jax import errors, types
from atlas_jax.rewards import custom, isolated

_LIMITS = isolated.Limits(timeout_s=2.0, max_memory_bytes=0)


def _records(*questions, teaching="add them up"):
  completion = types.Completion((1, 2), (-0.1, -0.2), (-0.1, -0.2), "stop", 3)
  attempt = types.Attempt("4", 1, "stop", correct=True)
  return [
    types.TeachingRecord(
      question=types.Question(f"q{i // 2}", question, "4"),
      probe="p",
      teacher_rollout=types.Rollout(types.Prompt("q", "t", (1,)), completion),
      teaching=teaching,
      num_teaching_tokens=2,
      baseline=(attempt,),
      taught=(attempt, attempt),
      leaked=False,
      completion_text="1234",
    )
    for i, question in enumerate(questions)
  ]


def _open(name):
  return custom.open_function(f"tests.reward_functions:{name}", _LIMITS)


def test_a_failure_affects_only_its_question():
  with _open("count_words") as reward_fn:
    rewards = reward_fn(_records("a", "a", "raise", "a", "a", "a", "hang", "a"))
  assert [reward.value for reward in rewards] == [3.0, 3.0, None, None] * 2
  assert rewards[0].parts == {"words": 3.0}
  assert "KeyError" in rewards[2].missing_reason
  assert "secret" not in rewards[2].missing_reason
  assert "2 s" in rewards[6].missing_reason


def test_plain_numbers_are_accepted_and_none_is_missing():
  with _open("plain") as reward_fn:
    rewards = reward_fn(_records("a", "a"))
  assert [reward.value for reward in rewards] == [0.0, None]


def test_a_function_in_a_file_may_import_its_neighbours(tmp_path):
  (tmp_path / "lengths.py").write_text("SCALE = 2\n")
  # Its name does not hide the standard module, which it imports here.
  file = tmp_path / "types.py"
  file.write_text(
    "import types\n"
    "import lengths\n"
    "scale = types.SimpleNamespace(value=lengths.SCALE).value\n"
    "def brevity(records):\n"
    "  return [-scale * len(record.completion_text) for record in records]\n"
  )
  functions = custom.parse([f"{file}:brevity=2"], timeout_s=2.0, memory_gb=0.0)
  ((path, weight),) = functions.weights.items()
  assert weight == 2.0
  with custom.open_function(path, _LIMITS) as reward_fn:
    assert [r.value for r in reward_fn(_records("a", "a"))] == [-8.0, -8.0]


def test_an_undefined_function_lists_those_of_its_file(tmp_path, capfd):
  file = tmp_path / "reward.py"
  file.write_text("def brevity(records):\n  return [0] * len(records)\n")
  with (
    pytest.raises(errors.ConfigError, match="Failed to start"),
    custom.open_function(f"{file}:brevty", _LIMITS),
  ):
    pass
  shown = capfd.readouterr().err
  assert "Functions there: brevity." in shown
  assert "Traceback" not in shown


def test_a_missing_file_is_reported_with_its_directory(tmp_path):
  with pytest.raises(errors.ConfigError, match=r"reward\.py does not exist"):
    custom.parse(
      [f"{tmp_path}/reward.py:brevity"], timeout_s=2.0, memory_gb=0.0
    )


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (isolated.Answer([{"value": 1.0}]), "1 rewards for 2"),
    (isolated.Answer([{"value": float("nan")}, {"value": 1.0}]), "nan"),
    (isolated.Answer([{"value": float("-inf")}, {"value": 1.0}]), "-inf"),
    (
      isolated.Answer(
        [{"value": 1.0, "parts": {"a": float("inf")}}, {"value": 1.0}]
      ),
      "inf",
    ),
    (isolated.Answer(failure="it hung"), "it hung"),
  ],
)
def test_invalid_rewards_are_missing(value, expected):
  first, second = custom._read(value, 2)
  assert first.value is None
  assert expected in first.missing_reason
  if isinstance(value.value, list) and len(value.value) == 2:
    assert second.value == 1.0


def test_repeated_failures_stop_the_run():
  with _open("always_raises") as reward_fn:
    for _ in range(custom._MAX_FAILURES - 1):
      assert reward_fn(_records("a"))[0].value is None
    with pytest.raises(errors.ConfigError, match="RuntimeError"):
      reward_fn(_records("a"))


def test_failures_that_are_not_consecutive_do_not_stop_the_run():
  with _open("count_words") as reward_fn:
    for _ in range(custom._MAX_FAILURES):
      rewards = reward_fn(_records("raise", "a", "a", "a"))
  assert [reward.value for reward in rewards] == [None, None, 3.0, 3.0]


def test_options_are_paths_with_weights():
  functions = custom.parse(["a.b:c", "d:e=-0.5"], timeout_s=3.0, memory_gb=1.5)
  assert functions.weights == {"a.b:c": 1.0, "d:e": -0.5}
  assert functions.limits == isolated.Limits(3.0, 1_500_000_000)


@pytest.mark.parametrize(
  "options",
  [
    ["a.b"],
    ["a:b=x"],
    ["a:b=nan"],
    ["a:b="],
    [":b"],
    ["a:b", "a:b=2"],
    ["a/b:c"],
    ["a:b=1=2"],
  ],
)
def test_other_options_are_rejected(options):
  with pytest.raises(errors.ConfigError, match="--reward_fn"):
    custom.parse(options, timeout_s=3.0, memory_gb=0.0)


@pytest.mark.parametrize("timeout_s", [0.0, float("inf"), float("nan")])
def test_a_function_must_have_a_deadline(timeout_s):
  with pytest.raises(errors.ConfigError, match="reward_fn_timeout_s"):
    custom.parse([], timeout_s=timeout_s, memory_gb=0.0)
