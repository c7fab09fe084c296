# SPDX-License-Identifier: Apache-2.0
"""Reward functions as users write them, valid and invalid."""

import os
import sys
import time

from atlas_jax import types


def count_words(records):
  """Rewards the number of words, after misbehaving as the question asks."""
  rewards = []
  for record in records:
    _misbehave(record.question.question)
    words = len((record.teaching or "").split())
    rewards.append(types.Reward(float(words), parts={"words": float(words)}))
  return rewards


def sum_token_ids(records):
  """Rewards by the tokens' ids, so that different completions differ."""
  rollouts = (record.teacher_rollout for record in records)
  return [
    types.Reward(sum(rollout.completion.token_ids) % 97 / 97)
    for rollout in rollouts
  ]


def plain(records):
  """Returns plain numbers, with None for the last record."""
  return [float(i) for i, _ in enumerate(records[1:])] + [None]


def always_raises(records):
  """Raises RuntimeError."""
  raise RuntimeError(f"cannot reward {len(records)} records")


def echo(value):
  """Returns the value, after misbehaving as it asks."""
  _misbehave(value)
  return value


def pid(value):
  """Sleeps for `value` seconds and returns the process id."""
  time.sleep(value)
  return os.getpid()


def _misbehave(how):
  match how:
    case "raise":
      raise KeyError("a secret")
    case "hang":
      while True:
        pass
    case "leave children":
      os.fork()
      time.sleep(60)
    case "exit":
      raise SystemExit(4)
    case "eat":
      bytearray(4 << 30)
    case "print":
      sys.stdout.write("\n{}\n")


not_a_function = 7
