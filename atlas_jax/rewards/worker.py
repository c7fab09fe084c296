# SPDX-License-Identifier: Apache-2.0
"""The process behind `isolated.Worker`: runs one function.

  python -m atlas_jax.rewards.worker DESCRIPTOR TARGET KIND MAX_MEMORY

TARGET is `module:function`. It is called with the JSON value of each line on
the socket DESCRIPTOR, either unchanged (KIND "json") or parsed as teaching
records ("records"). The reply is a line: {"value": ...} or {"failure": ...}.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib
import json
import os
import queue
import resource
import socket
import sys
import threading
import traceback
import types as python_types
from typing import Any

from atlas_jax import types

_Function = Callable[[Any], Any]  # Any: a user's function, and JSON.


def main() -> None:
  """Serves calls until the other end of the socket is closed."""
  descriptor, target, kind, max_memory = sys.argv[1:]
  if int(max_memory):
    limit = int(max_memory)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  function = _load(target)
  if kind == "records":
    function = _on_records(function)
  channel = socket.socket(fileno=int(descriptor))
  channel.sendall(b"{}\n")  # Ready.
  for line in _lines(channel):
    reply = json.dumps(_call(function, json.loads(line)))
    channel.sendall(reply.encode() + b"\n")


def _load(target: str) -> _Function:
  """Imports the function named by `target`."""
  module, _, name = target.partition(":")
  function = getattr(importlib.import_module(module), name)
  if not callable(function):
    raise TypeError(f"{target} is not a function.")
  return function


def _on_records(function: _Function) -> _Function:
  """Wraps a `types.RewardFn`, or a function that returns numbers, for JSON."""

  def called(fields: Any) -> list[dict[str, Any]]:  # Any: as above.
    records = [types.teaching_record(record) for record in fields]
    return [_to_json(reward) for reward in function(records)]

  return called


def _to_json(
  reward: types.Reward | float | None,
) -> dict[str, Any]:  # Any: JSON.
  if not isinstance(reward, types.Reward):
    reward = types.Reward(reward, "returned None")
  value = None if reward.value is None else float(reward.value)
  parts = {name: float(part) for name, part in reward.parts.items()}
  return dataclasses.asdict(
    dataclasses.replace(reward, value=value, parts=parts)
  )


def _lines(channel: socket.socket) -> Iterator[bytes]:
  """Yields received lines; exits the process once its parent has exited."""
  arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

  def listen() -> None:
    with channel.makefile("rb") as file:
      for line in file:
        arrived.put(line)
    os._exit(0)  # Also while the function is running or hangs.

  threading.Thread(target=listen, daemon=True).start()
  while True:
    yield arrived.get()


def _call(function: _Function, argument: Any) -> dict[str, Any]:  # Any: JSON.
  """Calls the function and returns its value or failure."""
  outcome = _Outcome()
  with outcome:
    outcome.reply = {"value": function(argument)}
  return outcome.reply


class _Outcome(contextlib.AbstractContextManager["_Outcome"]):
  """Converts any exception of a user's function to a reply.

  The traceback goes to stderr. The reply has only the exception's class, since
  messages may quote prompts.
  """

  def __init__(self) -> None:
    self.reply: dict[str, Any] = {}  # Any: JSON.

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    where: python_types.TracebackType | None,
  ) -> bool:
    if not isinstance(error, Exception):
      return False
    traceback.print_exception(error)
    self.reply = {"failure": f"raised {type(error).__name__}"}
    return True


if __name__ == "__main__":
  main()
