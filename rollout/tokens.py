# SPDX-License-Identifier: Apache-2.0
"""The tokens that clients and servers share: environment variables or a file.

A token is never a command line argument: those are visible to all users of the
machine.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import secrets

from atlas_jax import errors

VARIABLE = "ATLAS_ROLLOUT_TOKEN"
ADMIN_VARIABLE = "ATLAS_ROLLOUT_ADMIN_TOKEN"
FILE_VARIABLE = "ATLAS_ROLLOUT_TOKEN_FILE"
_NUM_BYTES = 32


def of_environment(environ: Mapping[str, str]) -> str | None:
  """Returns a client's token: the admin token, the token, or that of a file.

  Raises:
    errors.ConfigError: if the file cannot be read.
  """
  for variable in (ADMIN_VARIABLE, VARIABLE):
    if token := environ.get(variable, "").strip():
      return token
  if path := environ.get(FILE_VARIABLE, ""):
    return read(pathlib.Path(path)) or None
  return None


def read(file: pathlib.Path) -> str:
  """Returns the token in a file.

  Raises:
    errors.ConfigError: if it cannot be read.
  """
  try:
    return file.read_text(encoding="utf-8").strip()
  except (OSError, ValueError) as error:
    raise errors.ConfigError(
      "Cannot read the token file.",
      where=str(file),
      why=str(error),
      fix="Use a text file that this user can read.",
    ) from error


@contextlib.contextmanager
def new_file(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a file with a new token, which only this user can read.

  It is removed on exit.
  """
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / "token"
  path.unlink(missing_ok=True)  # Of a launcher that was killed.
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
  with open(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
    file.write(secrets.token_hex(_NUM_BYTES))
  try:
    yield path
  finally:
    path.unlink(missing_ok=True)
