# SPDX-License-Identifier: Apache-2.0
"""From an app to a process that listens, and ends when it is asked to."""

from collections.abc import Callable, Iterator
import contextlib
import ipaddress
import math
import os
import pathlib
import signal
import socket

from absl import logging
import fastapi
import uvicorn

from atlas_jax import errors

TOKEN_VARIABLE = "ATLAS_ROLLOUT_TOKEN"
_MIN_TOKEN_CHARACTERS = 16


def read_token(host: str, file: pathlib.Path | None) -> str | None:
  """Finds the token which clients must send.

  Args:
    host: where the server will listen.
    file: holds the token; None for the environment variable. Never an argument
      of the command line, where every user of the machine would see it.

  Returns:
    The token, or None if there is none and only this machine can connect.

  Raises:
    errors.ConfigError: if there is none and others can connect, or it is too
      short to be one.
  """
  try:
    text = (
      file.read_text(encoding="utf-8")
      if file
      else os.environ.get(TOKEN_VARIABLE, "")
    )
  except (OSError, ValueError) as error:
    raise errors.ConfigError(
      "The token cannot be read.",
      where=f"--token_file={file}",
      why=str(error),
      fix="Give a file that this user may read.",
    ) from error
  token = text.strip()
  if not token and not file and is_loopback(host):
    return None
  if len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii():
    raise errors.ConfigError(
      "A token is needed to listen here."
      if not token
      else "The token is not one.",
      where=f"--host={host}",
      why="Whoever reaches the server can use it and replace its weights; "
      f"a token has at least {_MIN_TOKEN_CHARACTERS} ASCII characters.",
      fix=f"Set {TOKEN_VARIABLE} (openssl rand -hex 32) or --token_file on "
      "both sides, or listen on --host=127.0.0.1.",
    )
  return token


def bind(host: str, port: int) -> socket.socket:
  """Takes the port before anything slow is done; nobody can connect yet.

  Raises:
    errors.ConfigError: if it is taken, naming the next free one.
  """
  where = f"--host={host} --port={port}"
  try:
    family, kind, _, _, address = socket.getaddrinfo(
      host, None, type=socket.SOCK_STREAM
    )[0]
  except OSError as error:
    raise errors.ConfigError(
      f"The host {host!r} is unknown.",
      where=where,
      why=str(error),
      fix="Use an address of this machine, such as 127.0.0.1.",
    ) from error

  def take(port: int) -> socket.socket:
    bound = socket.socket(family, kind)
    # What a closed connection leaves behind is no obstacle.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      bound.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError):
      bound.close()
      raise
    return bound

  try:
    return take(port)
  except (OSError, OverflowError) as error:
    raise errors.ConfigError(
      f"Cannot listen on port {port}.",
      where=where,
      why=str(error),
      fix=_advice(take, port),
    ) from error


async def serve(
  app: fastapi.FastAPI, bound: socket.socket, *, drain_s: float
) -> None:
  """Listens until SIGTERM or SIGINT, then lets what runs come to its end.

  Args:
    app: what is served.
    bound: see `bind`.
    drain_s: how long running requests may take after the signal.
  """
  config = uvicorn.Config(
    app,
    log_level="warning",
    # One line per request of ours says more than an access log.
    access_log=False,
    timeout_graceful_shutdown=math.ceil(drain_s),
  )
  await uvicorn.Server(config).serve(sockets=[bound])


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Makes SIGTERM end the block, at any point, as Ctrl-C does, and no more.

  While `serve` listens, it has both signals for itself.
  """

  def stop(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt

  signals = (signal.SIGTERM, signal.SIGINT)
  old = {number: signal.signal(number, stop) for number in signals}
  try:
    yield
  except KeyboardInterrupt:
    logging.info("Stopped.")
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach what listens on `host`."""
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _advice(take: Callable[[int], socket.socket], port: int) -> str:
  """Names the next free port, if one of the next hundred is."""
  for other in range(port + 1, port + 101):
    with contextlib.suppress(OSError, OverflowError), take(other):
      return f"Use --port={other}, or stop what listens there."
  return "Use a --port below 65536, and a --host of this machine."
