# SPDX-License-Identifier: Apache-2.0
"""Prints the first rows as they are trained, instead of training on them.

  python -m scripts.train_sft --config=configs/run/teacher_sft.py \
    --config.data.path=my.csv --show_samples=3

Reads these rows and the tokenizer only; docs/data.md explains the output.
"""

from collections.abc import Iterator
import pathlib
import tempfile

from absl import flags

from atlas_jax import chat, types
from atlas_jax.data import sets
from atlas_jax.teaching import templates
from conversion import load
from scripts.job import arguments, tokenizers

_NUM_ROWS = flags.DEFINE_integer(
  "show_samples",
  0,
  "Rows of each dataset to print as they are trained; then the program exits.",
  lower_bound=0,
)


def print_if_requested(recipe: str) -> bool:
  """Prints rows if --show_samples is set; returns whether it is.

  Raises:
    errors.AtlasError: if the tokenizer or the rows are invalid.
  """
  if not _NUM_ROWS.value:
    return False
  config = arguments.parse_config(recipe)
  arguments.check_data(config)
  tokenizer = tokenizers.open_tokenizer(
    load.resolve(config.model.path, with_weights=False),
    chat_template=config.model.chat_template,
    chat_template_kwargs=config.model.chat_template_kwargs,
  )
  with tempfile.TemporaryDirectory() as folder:  # For the list of bad rows.
    for where, text in of_config(
      config, tokenizer, _NUM_ROWS.value, pathlib.Path(folder)
    ):
      print(f"--- {where}\n{text}\n")
  return True


def of_config(
  config: types.Config,
  tokenizer: chat.Tokenizer,
  num_rows: int,
  workdir: pathlib.Path,
) -> Iterator[tuple[str, str]]:
  """Yields location and text of the first rows of each dataset.

  In a conversation, the tokens that count for the loss are in `[[ ]]`. A
  question is rendered as the policy gets it, followed by its answer, which only
  the reward reads.

  Args:
    config: of a recipe.
    tokenizer: of the policy.
    num_rows: of each dataset.
    workdir: directory of the list of invalid rows.

  Raises:
    errors.AtlasError: if the rows are invalid.
  """
  data = sets.Selection(**{**config.data, "max_rows": num_rows})
  if config.recipe in ("sft", "gkd"):
    yield from sets.samples(
      tokenizer, data, with_prompt=config.recipe == "gkd", workdir=workdir
    )
    return
  for question in sets.all_questions(data, workdir=workdir):
    if "templates" in config:
      text = templates.fill(
        config.templates.teach, question=question.question, probe="(the plan)"
      )
    else:
      text = templates.fill(config.template, question=question.question)
    prompt, _ = chat.render(tokenizer, [types.Message("user", text)])
    yield question.row_id, f"{prompt}[[...]]\nanswer: {question.answer}"
