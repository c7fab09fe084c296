# SPDX-License-Identifier: Apache-2.0
"""Entry point of every script: flags, logging, exit codes."""

from collections.abc import Callable
import contextlib
import logging as stdlib_logging
import os
import pathlib
import sys
import time
import traceback

from absl import app, flags, logging

from atlas_jax import errors

_LEAVE_S = 3.0
_ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(main: Callable[[], int | None]) -> None:
  """Runs `main` and exits with a code of `errors.Exit`.

  `main` may return the exit code of a child process that has already reported
  its failure. An `AtlasError` is printed to stderr in four lines, any other
  exception with its traceback.
  """

  def guarded(argv: list[str]) -> None:
    code = None
    try:
      if len(argv) > 1:
        raise errors.ConfigError(
          f"Unexpected arguments {argv[1:]}.",
          where="command line",
          why="Flags start with --, and config values are set by name.",
          fix="Write, for example, --config.seed=1.",
        )
      code = main() or errors.Exit.DONE
    except errors.AtlasError as error:
      code = _report(error)
    except KeyboardInterrupt:
      code = _report(
        errors.PreemptedError(
          "Interrupted.",
          where="this process",
          why="It received a stop signal while it had nothing to save.",
          fix="Run the same command again: completed work is kept.",
        )
      )
    finally:
      if code is None:  # An unexpected exception.
        code = errors.Exit.INTERNAL
        with contextlib.suppress(OSError):
          traceback.print_exc()
      _exit(int(code))

  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(_is_relevant)
  handler.setFormatter(
    stdlib_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  app.run(guarded, flags_parser=_parse_flags)


def _exit(code: int) -> None:
  """Exits this process.

  In a multi-process run, a failed process must not wait for the others at exit,
  as JAX does, since they may be waiting for it. It first sleeps briefly, so
  that the others can report the same failure themselves.
  """
  jax = sys.modules.get("jax")  # None if it was never imported.
  if code and jax is not None and jax.distributed.is_initialized():
    time.sleep(_LEAVE_S)
    logging.flush()
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _report(error: errors.AtlasError) -> errors.Exit:
  logging.flush()
  with contextlib.suppress(OSError):  # A closed stderr is ignored.
    print(f"\n{error}", file=sys.stderr)
  return error.exit_code


def _is_relevant(record: stdlib_logging.LogRecord) -> bool:
  """Drops records below WARNING that come from libraries."""
  in_house = _ROOT in pathlib.Path(record.pathname).resolve().parents
  in_library = "site-packages" in record.pathname
  return record.levelno >= stdlib_logging.WARNING or (
    in_house and not in_library
  )


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; an invalid flag is reported and exits with its own code."""
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      # Errors in a config file are raised only when the config is accessed.
      flags.FLAGS.config.lock()
    return rest
  except (
    flags.Error,
    OSError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
  ) as error:
    invalid = errors.ConfigError(
      "Invalid flags.",
      where="command line",
      why=_reason(error),
      fix="Use --help to list the flags, --config.KEY=VALUE to set a config "
      "value.",
    )
    sys.exit(int(_report(invalid)))


def _reason(error: Exception) -> str:
  """Extracts the message from an absl or ml_collections exception."""
  inner = error.args[0] if isinstance(error, AttributeError) else error
  if isinstance(inner, KeyError):  # str() would quote it once more.
    text = f"Unknown config key {inner.args[0]}"
  else:
    text = str(inner)
  if "Traceback" in text:
    text = text.strip().splitlines()[-1]
  return " ".join(text.split())
