# SPDX-License-Identifier: Apache-2.0
"""Reward functions as users write them, good and bad."""

import os
import sys
import time

from atlas_jax import types


def count_words(records):
  """Rewards by the number of words; does what a question says before."""
  rewards = []
  for record in records:
    _misbehave(record.question.question)
    words = len((record.teaching or "").split())
    rewards.append(types.Reward(float(words), parts={"words": float(words)}))
  return rewards


def plain(records):
  """Gives plain numbers, and one that is missing."""
  return [float(i) for i, _ in enumerate(records[1:])] + [None]


def always_raises(records):
  """Is broken."""
  raise RuntimeError(f"cannot reward {len(records)} records")


def echo(value):
  """Does with JSON what it says."""
  _misbehave(value)
  return value


def pid(value):
  """Tells which process this is, and sleeps."""
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
