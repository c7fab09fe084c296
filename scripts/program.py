# SPDX-License-Identifier: Apache-2.0
"""Entry point of every script: flags, help, logging, exit codes."""

from collections.abc import Callable, Sequence
import contextlib
import logging as stdlib_logging
import os
import pathlib
import re
import select
import signal
import sys
import textwrap
import time
import traceback
from typing import NoReturn, Protocol

from absl import app, flags, logging

from atlas_jax import errors
import scripts

LOG_FORMAT = stdlib_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
_LEAVE_S = 3.0
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_HELP = ("--help", "-help", "-h", "-?", "--helpshort")
_HELP_FULL = ("--helpfull", "-helpfull")
_PACKAGES = ("atlas_jax", "conversion", "rollout", "scripts")


# What flags, config files and overrides of their keys raise.
INVALID = (
  flags.Error,
  AttributeError,
  ImportError,
  KeyError,
  NameError,
  OSError,
  SyntaxError,
  TypeError,
  ValueError,
)


class ConfigHelp(Protocol):
  """Describes the config of a script, for `--help` and for unknown names."""

  def describe(self) -> str:
    """Returns the settings that are often changed."""
    ...

  def expand(self, argv: Sequence[str]) -> list[str]:
    """Returns `argv` with the file of a recipe in place of its name."""
    ...

  def suggest(self, argv: Sequence[str]) -> str:
    """Returns advice on the unknown names in `argv`, or ""."""
    ...


def run(
  main: Callable[..., int | None],
  *,
  config_help: ConfigHelp | None = None,
  takes_words: bool = False,
) -> None:
  """Runs `main` and exits with a code of `errors.Exit`.

  If it `takes_words`, it is called with the arguments that are not flags. It
  may return the exit code of a child process that has already reported its
  failure. `--help` prints the docstring of the calling module, the settings
  of `config_help` and the flags.
  """
  doc = sys._getframe(1).f_globals.get("__doc__") or ""

  def guarded(argv: list[str]) -> None:
    def checked() -> int | None:
      if takes_words:
        return main(argv[1:])
      if len(argv) > 1:
        raise errors.ConfigError(
          f"Unexpected arguments {argv[1:]}.",
          where="command line",
          why="Flags start with --, and config values are set by name.",
          fix="Write, for example, --config.seed=1.",
        )
      return main()

    leave(checked)

  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(_is_relevant)
  handler.setFormatter(LOG_FORMAT)
  app.run(guarded, flags_parser=lambda argv: _parse(argv, doc, config_help))


def leave(main: Callable[[], int | None]) -> NoReturn:
  """Runs `main` and exits; reports an exception and exits with its code.

  An `AtlasError` is printed to stderr in four lines, any unexpected exception
  with its traceback. If the reader of stdout has closed it, as in `| head`,
  the output ends early, with code 0.
  """
  if signal.getsignal(signal.SIGINT) is scripts.exit_on_interrupt:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  code = None
  try:
    code = main() or errors.Exit.DONE
    sys.stdout.flush()
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
  except BrokenPipeError:
    if _is_stdout_closed():
      code = errors.Exit.DONE
      # Python flushes stdout again at exit, which would fail again.
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    else:
      raise
  except (AssertionError, RuntimeError) as error:
    if not _is_without_backend(error):
      raise
    code = _report(_no_backend(error))
  finally:
    if code is None:  # An unexpected exception.
      code = errors.Exit.INTERNAL
      with contextlib.suppress(OSError):
        traceback.print_exc()
    _exit(int(code))


def _is_stdout_closed() -> bool:
  """Returns whether stdout is a pipe whose reader has closed it."""
  poller = select.poll()
  poller.register(1, select.POLLOUT)
  return any(event & select.POLLERR for _, event in poller.poll(0))


def _is_without_backend(error: Exception) -> bool:
  """Returns whether JAX has raised because a platform is not available."""
  if isinstance(error, AssertionError):  # JAX_PLATFORMS=cuda without a GPU.
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.endswith("jax/_src/xla_bridge.py")
  return str(error).startswith("Unable to initialize backend")


def _no_backend(error: Exception) -> errors.ConfigError:
  platforms = os.environ.get("JAX_PLATFORMS", "")
  return errors.ConfigError(
    "JAX cannot use the requested platform.",
    where=f"JAX_PLATFORMS={platforms}" if platforms else "this machine",
    why=" ".join(str(error).split()) or "JAX finds no such device.",
    fix="Run unset JAX_PLATFORMS to use the devices there are, or "
    "JAX_PLATFORMS=cpu. python -m atlas_jax.doctor shows why a device is "
    "missing.",
  )


def _exit(code: int) -> NoReturn:
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
  path = pathlib.Path(record.pathname).resolve()
  in_house = path.is_relative_to(_ROOT) and (
    path.relative_to(_ROOT).parts[0] in _PACKAGES
  )
  return in_house or record.levelno >= stdlib_logging.WARNING


def _parse(
  argv: list[str], doc: str, config_help: ConfigHelp | None
) -> list[str]:
  """Parses flags; prints help, or reports an invalid flag, and exits."""
  if is_help(argv[1:]):
    leave(lambda: _print_help(argv, doc, config_help))
  try:
    rest = flags.FLAGS(config_help.expand(argv) if config_help else argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      # Errors in a config file are raised only when the config is accessed.
      flags.FLAGS.config.lock()
    return rest
  except errors.ConfigError as error:
    sys.exit(int(_report(error)))
  except INVALID as error:
    advice = config_help.suggest(argv) if config_help else ""
    invalid = errors.ConfigError(
      "Invalid flags.",
      where="command line",
      why=_reason(error),
      fix=advice or "Use --help to list the flags.",
    )
    sys.exit(int(_report(invalid)))


def _print_help(
  argv: Sequence[str], doc: str, config_help: ConfigHelp | None
) -> None:
  """Prints purpose, example, settings and flags of a script."""
  print(with_line_breaks(doc))
  if config_help is not None:
    print(f"\n{config_help.describe()}")
  everything = bool({*_HELP_FULL} & {*argv})
  print(f"\n{help_on_flags(flags.FLAGS, argv[0], everything=everything)}")


def with_line_breaks(doc: str | None) -> str:
  """Restores the line breaks in commands, which a docstring escapes."""
  return re.sub(r"(?<=\S) {5}(?=\S)", " \\\\\n    ", (doc or "").strip())


def is_help(words: Sequence[str]) -> bool:
  """Returns whether a command line asks for help."""
  return bool({*_HELP, *_HELP_FULL} & {*words})


def help_on_flags(
  values: flags.FlagValues, script: str, *, everything: bool = False
) -> str:
  """Lists flags, with their defaults; by default those of this project only."""
  lines = ["Flags:"]
  for module, defined in values.flags_by_module_dict().items():
    is_ours = module == script or module.partition(".")[0] in _PACKAGES
    for flag in defined if is_ours or everything else ():
      default = "" if flag.default in (None, "", [], False) else flag.default
      choices = getattr(flag.parser, "enum_values", None)
      value = "|".join(filter(None, choices)) if choices else "VALUE"
      name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={value}"
      text = " ".join((flag.help or "").split())
      text = text.removeprefix(f"<{value}>: ")
      if default != "" and not isinstance(default, bool):
        text += f" Default: {default}."
      elif default is True:
        text += " Default: true."
      lines.append(f"  {name}")
      lines += textwrap.wrap(
        text, 74, initial_indent=6 * " ", subsequent_indent=6 * " "
      )
  return "\n".join(lines)


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
