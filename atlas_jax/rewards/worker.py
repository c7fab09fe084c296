# SPDX-License-Identifier: Apache-2.0
"""The process behind `isolated.Worker`: runs one function.

  python -m atlas_jax.rewards.worker DESCRIPTOR TARGET KIND MAX_MEMORY

TARGET is `module:function` or `FILE.py:function`. It is called with the JSON
value of each line on the socket DESCRIPTOR, either unchanged (KIND "json") or
parsed as teaching records ("records"). The reply is a line: {"value": ...} or
{"failure": ...}.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
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
  """Imports the function named by `target`.

  Raises:
    SystemExit: if the module defines no such function.
  """
  source, _, name = target.rpartition(":")
  if source.endswith(".py"):
    module = _load_file(pathlib.Path(source).resolve())
  else:
    module = importlib.import_module(source)
  function = getattr(module, name, None)
  if not callable(function):
    defined = [n for n, v in vars(module).items() if inspect.isfunction(v)]
    raise SystemExit(
      f"{target} is not a function. Functions there: {', '.join(defined)}."
    )
  return function


def _load_file(path: pathlib.Path) -> python_types.ModuleType:
  """Imports a file, which may import modules next to it."""
  sys.path.append(str(path.parent))
  # Not by its own name, which may be that of another module.
  spec = importlib.util.spec_from_file_location("reward_file", path)
  if spec is None or spec.loader is None:
    raise ImportError(f"{path} is not a Python file.")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Dataclasses look their module up.
  spec.loader.exec_module(module)
  return module


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
