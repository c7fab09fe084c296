# SPDX-License-Identifier: Apache-2.0
"""Tokens, socket, signals and the HTTP loop of the server process."""

import asyncio
from collections.abc import Iterator, Mapping
import contextlib
import math
import pathlib
import signal
import socket

from absl import logging
import fastapi
import h11
import uvicorn
from uvicorn.protocols.http import h11_impl

from atlas_jax import errors
from rollout import addresses, tokens
from rollout.server import admission

# More are closed at once: each needs a file descriptor.
_MAX_CONNECTIONS = 512
# Of a read from a socket. Chunks of one byte take 50 us each to parse, before
# the request is rejected.
_READ_BYTES = 2**13
# Limit for a request's headers to arrive, and for an idle connection.
_HEAD_S = 20.0
_MIN_TOKEN_CHARACTERS = 16


def read_token(
  host: str, file: pathlib.Path | None, environ: Mapping[str, str]
) -> str | None:
  """Returns the token that clients must send.

  Args:
    host: the address the server will listen on.
    file: contains the token; None to use the environment.
    environ: may contain the token, or the path of its file.

  Returns:
    The token, or None if no token is set and `host` is a loopback address.

  Raises:
    errors.ConfigError: if no token is set and other machines can connect, or
      the token is too short.
  """
  if not file and not environ.get(tokens.VARIABLE, "").strip():
    path = environ.get(tokens.FILE_VARIABLE, "")
    file = pathlib.Path(path) if path else None
  if file:
    token = tokens.read(file)
  else:
    token = environ.get(tokens.VARIABLE, "").strip()
    if not token and addresses.is_loopback(host):
      return None
  _check_token(token, where=f"--host={host}")
  return token


def read_tokens(
  host: str, file: pathlib.Path | None, environ: Mapping[str, str]
) -> admission.Tokens:
  """Returns the tokens for sampling and for replacing weights.

  The admin token is optional, and in the environment only. Without it, the user
  token of `read_token` grants access to all endpoints.

  Raises:
    errors.ConfigError: if a token is missing or too short, or both are equal.
  """
  user = read_token(host, file, environ)
  name = tokens.ADMIN_VARIABLE
  admin = environ.get(name, "").strip() or None
  if admin is not None:
    _check_token(admin, where=name)
    if user is None or user == admin:
      raise errors.ConfigError(
        f"{name} requires a different {tokens.VARIABLE}.",
        where=name,
        why=f"{tokens.VARIABLE} is "
        + ("not set." if user is None else "the same token."),
        fix=f"Set {tokens.VARIABLE} to a different token, or unset {name}.",
      )
  return admission.Tokens(user=user, admin=admin)


def bind(host: str, port: int) -> socket.socket:
  """Returns a socket bound to the port; it does not accept connections yet.

  Binding before the engine starts reports a port conflict immediately.

  Raises:
    errors.ConfigError: if the port is in use; suggests the next free one.
  """
  where = f"--host={host} --port={port}"
  try:
    return addresses.bind(host, port)
  except socket.gaierror as error:
    raise errors.ConfigError(
      f"Cannot resolve host {host!r}.",
      where=where,
      why=str(error),
      fix="Use an address of this machine, such as 127.0.0.1.",
    ) from error
  except (OSError, OverflowError) as error:
    raise errors.ConfigError(
      f"Cannot listen on port {port}.",
      where=where,
      why=str(error),
      fix=_suggestion(host, port),
    ) from error


async def serve(
  app: fastapi.FastAPI, bound: socket.socket, *, drain_s: float
) -> None:
  """Serves until SIGTERM or SIGINT, then waits for running requests.

  Args:
    app: the application to serve.
    bound: see `bind`.
    drain_s: how long running requests may take after the signal.
  """
  config = uvicorn.Config(
    app,
    http=_Protocol,
    loop="asyncio",
    ws="none",
    log_level="warning",
    # The service logs one line per request.
    access_log=False,
    timeout_graceful_shutdown=math.ceil(drain_s),
  )
  await uvicorn.Server(config).serve(sockets=[bound])


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """On SIGTERM or SIGINT, leaves the block at any point without an error.

  While `serve` runs, uvicorn handles both signals.
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


def _check_token(token: str, *, where: str) -> None:
  if len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii():
    raise errors.ConfigError(
      "A token is required to listen on this host."
      if not token
      else f"A token needs at least {_MIN_TOKEN_CHARACTERS} ASCII characters.",
      where=where,
      why="Without a secret token, every client that can connect can sample "
      "and replace the weights.",
      fix=f"Set {tokens.VARIABLE} (openssl rand -hex 32) or --token_file on "
      "server and client, or listen on --host=127.0.0.1.",
    )


class _Protocol(h11_impl.H11Protocol):
  """Limits the number of connections, and the time for request headers.

  uvicorn itself limits neither: beyond `limit_concurrency` it answers 503, but
  keeps the connection.
  """

  _head_timeout: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    if len(self.connections) > _MAX_CONNECTIONS:
      transport.abort()
      return
    # An attribute of asyncio's own transports, of 256 KiB.
    transport.max_size = _READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
    self._start_head_timeout()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._start_head_timeout()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    self._stop_head_timeout()

  def _start_head_timeout(self) -> None:
    if self.conn.their_state is not h11.IDLE:
      self._stop_head_timeout()
    elif self._head_timeout is None:
      self._head_timeout = self.loop.call_later(_HEAD_S, self.transport.abort)

  def _stop_head_timeout(self) -> None:
    if self._head_timeout is not None:
      self._head_timeout.cancel()
      self._head_timeout = None


def _suggestion(host: str, port: int) -> str:
  """Suggests a free port among the next hundred."""
  for other in range(port + 1, port + 101):
    with (
      contextlib.suppress(OSError, OverflowError),
      addresses.bind(host, other),
    ):
      return f"Set --port={other}, or stop the process that uses the port."
  return "Use a --port below 65536 and a --host of this machine."
