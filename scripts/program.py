# SPDX-License-Identifier: Apache-2.0
"""How every script begins and ends: flags, logs, exit codes."""

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
  """Runs a main; every way it can end has an exit code of its own.

  A main may give the exit code of a child which has told all there is.

  Known failures are told in four lines on stderr, unknown ones with their
  traceback. See `errors.Exit` for the codes.
  """

  def guarded(argv: list[str]) -> None:
    code = None
    try:
      if len(argv) > 1:
        raise errors.ConfigError(
          f"Unexpected arguments {argv[1:]}.",
          where="command line",
          why="Flags start with --; config values are set by name.",
          fix="For example --config.seed=1.",
        )
      code = main() or errors.Exit.DONE
    except errors.AtlasError as error:
      code = _tell(error)
    except KeyboardInterrupt:
      code = _tell(
        errors.PreemptedError(
          "Interrupted.",
          where="this process",
          why="It was asked to stop where it had nothing to save.",
          fix="Run the same command again: what is done already is kept.",
        )
      )
    finally:
      if code is None:  # Unknown to us.
        code = errors.Exit.INTERNAL
        with contextlib.suppress(OSError):
          traceback.print_exc()
      _exit(int(code))

  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(_ours_or_serious)
  handler.setFormatter(
    stdlib_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  app.run(guarded, flags_parser=_parse_flags)


def _exit(code: int) -> None:
  """Ends this process.

  One of several that failed does not wait for the others, as JAX would: they
  may wait for it. It only lets them fail by themselves, if they do so too.
  """
  jax = sys.modules.get("jax")  # Where there is none, nobody imported it.
  if code and jax is not None and jax.distributed.is_initialized():
    time.sleep(_LEAVE_S)
    logging.flush()
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _tell(error: errors.AtlasError) -> errors.Exit:
  logging.flush()
  with contextlib.suppress(OSError):  # Nobody may be reading any more.
    print(f"\n{error}", file=sys.stderr)
  return error.exit_code


def _ours_or_serious(record: stdlib_logging.LogRecord) -> bool:
  """Keeps libraries' progress reports out of ours."""
  in_house = _ROOT in pathlib.Path(record.pathname).resolve().parents
  in_library = "site-packages" in record.pathname
  return record.levelno >= stdlib_logging.WARNING or (
    in_house and not in_library
  )


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a bad one ends with its own message and exit code."""
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      # A file that could not be loaded says so only when it is used.
      flags.FLAGS.config.lock()
    return rest
  except (
    *(flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError),
  ) as error:
    wrong = errors.ConfigError(
      "The flags cannot be used.",
      where="command line",
      why=_reason(error),
      fix="--help lists the flags; --config.KEY=VALUE sets a config value.",
    )
    sys.exit(int(_tell(wrong)))


def _reason(error: Exception) -> str:
  """Finds the sentence in what absl and ml_collections raise."""
  inner = error.args[0] if isinstance(error, AttributeError) else error
  if isinstance(inner, KeyError):  # str() would quote it once more.
    text = f"There is no config key {inner.args[0]}"
  else:
    text = str(inner)
  if "Traceback" in text:
    text = text.strip().splitlines()[-1]
  return " ".join(text.split())
