# SPDX-License-Identifier: Apache-2.0
"""Converts, compares and lists models in Hugging Face or orbax format.

  python -m scripts.convert inspect A           lists tensors, from headers
  python -m scripts.convert verify A B          compares all tensors bit for bit
  python -m scripts.convert to_hf A OUT --source=MODEL
  python -m scripts.convert from_hf A OUT
  python -m scripts.convert from_gguf FILE OUT  writes a Hugging Face directory
  python -m scripts.convert merge --base=MODEL --adapter=PEFT --output=OUT

A and B are directories in Hugging Face format or orbax checkpoints: a step, or
a folder of steps or workdir, of which the newest step is used. --source=MODEL
is the model that was trained: a directory or a Hub id. See docs/conversion.md.
"""

from collections.abc import Sequence
import pathlib
import sys

from absl import flags
import jax

from atlas_jax import errors
from conversion import commands, listing
from scripts import dtypes, program

# A separate set: tests import other scripts with required flags.
_FLAGS = flags.FlagValues()
flags.DEFINE_string("source", "", "Model that was trained.", flag_values=_FLAGS)
flags.DEFINE_list(
  "ignore_fields",
  [],
  "Fields of config.json to treat as absent.",
  flag_values=_FLAGS,
)
flags.DEFINE_string("base", "", "Model of the adapter.", flag_values=_FLAGS)
flags.DEFINE_string(
  "adapter", "", "PEFT directory to merge into --base.", flag_values=_FLAGS
)
flags.DEFINE_string("output", "", "Target directory.", flag_values=_FLAGS)
dtypes.define_flag(
  "dtype",
  "",
  ("", "float32", "bfloat16"),
  "Precision to write; empty keeps that of the input.",
  flag_values=_FLAGS,
)
flags.DEFINE_integer(
  "max_shard_bytes",
  5 * 10**9,
  "Maximum bytes of tensors per file; a larger tensor gets its own file.",
  lower_bound=1,
  flag_values=_FLAGS,
)
flags.DEFINE_bool("overwrite", False, "Replace OUT.", flag_values=_FLAGS)
flags.DEFINE_bool(
  "merge",
  True,
  "Merge trained adapters into --source; if false, write them in PEFT format.",
  flag_values=_FLAGS,
)
flags.DEFINE_bool(
  "dry_run", False, "Print what would be written.", flag_values=_FLAGS
)
flags.DEFINE_bool(
  "logits",
  True,
  "Also compare logits; loads the models into memory.",
  flag_values=_FLAGS,
)


def main(argv: Sequence[str]) -> int:
  """Runs one command; returns the exit code."""
  if program.is_help(argv):
    print(f"{program.with_line_breaks(__doc__)}\n")
    print(program.help_on_flags(_FLAGS, sys.argv[0]))
    return int(errors.Exit.DONE)
  try:
    _run(_parse(argv))
  except errors.AtlasError as error:
    print(f"\n{error}", file=sys.stderr)
    return int(error.exit_code)
  except KeyboardInterrupt:
    print("\nInterrupted; partial files were removed.", file=sys.stderr)
    return int(errors.Exit.PREEMPTED)
  return int(errors.Exit.DONE)


def _parse(argv: Sequence[str]) -> list[str]:
  _FLAGS.unparse_flags()
  _FLAGS.set_gnu_getopt()  # Flags may follow the command.
  try:
    return _FLAGS(["convert", *argv])[1:]
  except flags.Error as error:
    raise _misused(str(error)) from error


def _run(words: Sequence[str]) -> None:
  # Host memory is enough, and larger than an accelerator's.
  jax.config.update("jax_platforms", "cpu")
  match words:
    case ["inspect", directory]:
      for line in listing.lines(pathlib.Path(directory)):
        print(line)
    case ["verify", left, right]:
      commands.verify_pair(pathlib.Path(left), pathlib.Path(right), _options())
    case ["to_hf", origin, out]:
      commands.to_hf(pathlib.Path(origin), pathlib.Path(out), _options())
    case ["from_hf", origin, out]:
      commands.from_hf(origin, pathlib.Path(out), _options())
    case ["from_gguf", origin, out]:
      commands.from_gguf(pathlib.Path(origin), pathlib.Path(out), _options())
    case ["merge"] if _FLAGS.base and _FLAGS.adapter and _FLAGS.output:
      commands.merge(
        _FLAGS.base,
        pathlib.Path(_FLAGS.adapter),
        pathlib.Path(_FLAGS.output),
        _options(),
      )
    case _:
      raise _misused(f"Got {' '.join(words) or 'nothing'}.")


def _options() -> commands.Options:
  return commands.Options(
    source=_FLAGS.source,
    ignore_fields=_FLAGS.ignore_fields,
    dtype=_FLAGS.dtype,
    max_shard_bytes=_FLAGS.max_shard_bytes,
    overwrite=_FLAGS.overwrite,
    merge=_FLAGS.merge,
    is_dry_run=_FLAGS.dry_run,
    with_logits=_FLAGS.logits,
  )


def _misused(why: str) -> errors.ConfigError:
  return errors.ConfigError(
    "Invalid arguments.",
    where="command line",
    why=why,
    fix="python -m scripts.convert --help lists commands and flags.",
  )


if __name__ == "__main__":
  program.leave(lambda: main(sys.argv[1:]))
