# SPDX-License-Identifier: Apache-2.0
"""Checks the files, data, servers and disk of a run before it starts."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from typing import Literal

import numpy as np

from atlas_jax import chat, errors, types
from atlas_jax.data import packing, sets
from atlas_jax.models import decoder, decoder_config
from atlas_jax.teaching import templates
from atlas_jax.train import gkd, gkd_batches
from conversion import load
from rollout import tokens, wire
from rollout.remote import client
from scripts.job import tokenizers

Status = Literal["ok", "absent", "warn", "FAIL"]

_SERVER_S = 5.0
# Only the questions with the most characters are tokenized: this many.
_NUM_LONGEST = 64
# Assumed tokens of the longest question in its template, without data.
_ASSUMED_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Check:
  """The result of one check.

  `absent` marks files that may be added later, `warn` what matters only on the
  machine of the run.
  """

  name: str
  status: Status
  found: str
  fix: str = ""


@dataclasses.dataclass
class Facts:
  """Results of the checks, and the sizes that they measured.

  Attributes:
    checks: in order.
    shape: config of the model; None if it is not readable.
    prompt_tokens: tokens of the longest question, in its template.
    steps_per_epoch: None without data, and for recipes without epochs.
    tokens_per_row: mean of a packed row, or in GKD of a prompt with its
      completion; None without data.
  """

  checks: list[Check] = dataclasses.field(default_factory=list)
  shape: decoder_config.DecoderConfig | None = None
  prompt_tokens: int = _ASSUMED_TOKENS
  steps_per_epoch: int | None = None
  tokens_per_row: float | None = None

  @contextlib.contextmanager
  def checking(self, name: str) -> Iterator[Callable[[str], None]]:
    """Adds a check that fails on `AtlasError`; yields a function to pass it."""
    try:
      yield lambda found: self.checks.append(Check(name, "ok", found))
    except errors.AtlasError as error:
      why = f"{error.what} {error.where}: {error.why}"
      self.checks.append(Check(name, "FAIL", why, error.fix))

  def absent(self, name: str, found: str) -> None:
    """Adds a check with the status `absent`."""
    self.checks.append(Check(name, "absent", found))


def run(config: types.Config) -> Facts:
  """Checks the files, data and servers of a config."""
  facts = Facts()
  tokenizer = _check_model(facts, "model", config.model)
  if "student" in config:
    _check_model(facts, "student", config.student)
  if config.recipe == "gkd":
    theirs = _check_model(facts, "teacher", config.teacher)
    if tokenizer is not None and theirs is not None:
      with facts.checking("one tokenizer") as ok:
        gkd.check_tokenizers(tokenizer, theirs)
        ok("policy and teacher use the same token ids")
  if config.data.path is None:
    facts.absent("data", "--config.data.path is not set")
  elif tokenizer is None:
    facts.absent("data", "not read: the model has no tokenizer yet")
  else:
    with facts.checking("data") as ok:
      ok(_check_data(facts, config, tokenizer))
  if "rollout" in config and config.rollout.backend == "http":
    for role in ("policy", "student"):
      for url in config.rollout[f"{role}_urls"]:
        with facts.checking(f"server of the {role}") as ok:
          ok(_check_server(url))
  return facts


def disk(workdir: pathlib.Path, num_bytes: int) -> Check:
  """Checks whether this machine's disk of a workdir has `num_bytes` free."""
  place = workdir.absolute()
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  found = f"{gib(num_bytes)} to write, {gib(free)} free in {place}"
  if num_bytes <= free:
    return Check("disk", "ok", found)
  return Check(
    "disk",
    "warn",
    f"{found}: too little, if the run is on this machine",
    "Choose a larger disk with --workdir, or keep less: "
    "--config.checkpoint.keep=1, --config.export.keep_steps=0.",
  )


def gib(num_bytes: float) -> str:
  """Formats bytes in GiB."""
  return f"{num_bytes / 2**30:,.2f} GiB"


def _check_model(
  facts: Facts,
  name: str,
  section: types.Config,
) -> chat.Tokenizer | None:
  """Checks a model directory, in which only config.json is required.

  Returns:
    The tokenizer, or None if it is absent or invalid.
  """
  tokenizer = None
  with facts.checking(name) as ok:
    directory = load.resolve(section.path, with_weights=False)
    shape, _ = load.read_config(directory, ignore_fields=section.ignore_fields)
    if name == "model":
      facts.shape = shape
    ok(
      f"{directory}: {shape.family}, {shape.num_layers} layers of "
      f"{shape.width}, {shape.vocab_size:,} tokens"
    )
    if any(directory.glob("*.safetensors*")) or any(directory.glob("*.bin")):
      with facts.checking(f"weights of the {name}") as ok:
        model = decoder.build(
          shape, dtype="float32", attention="auto", remat="none", unroll=1
        )
        ok(f"{len(load.open_tensors(directory, model))} tensors")
    else:
      facts.absent(f"weights of the {name}", "not found")
    if any(directory.glob("tokenizer*")):
      with facts.checking(f"tokenizer of the {name}") as ok:
        tokenizer = tokenizers.open_tokenizer(
          directory,
          chat_template=section.chat_template,
          chat_template_kwargs=section.chat_template_kwargs,
        )
        chat.check_vocabulary(tokenizer, shape.vocab_size, directory)
        ok(f"{len(tokenizer):,} tokens, with a chat template")
    else:
      facts.absent(f"tokenizer of the {name}", "not found")
  return tokenizer


def _check_data(
  facts: Facts,
  config: types.Config,
  tokenizer: chat.Tokenizer,
) -> str:
  """Reads the data as training does; returns a summary."""
  selection = sets.Selection(**config.data)
  held_out = sets.HeldOut(**config.held_out)
  with tempfile.TemporaryDirectory() as folder:  # For the list of bad rows.
    workdir = pathlib.Path(folder)
    if config.recipe == "grpo":
      questions, kept_out = sets.questions(
        selection,
        held_out,
        batch_size=config.batch.num_questions,
        seed=config.seed,
        workdir=workdir,
      )
      facts.prompt_tokens = _longest_prompt(
        config, tokenizer, questions.questions
      )
      return (
        f"{len(questions.questions):,} questions, {len(kept_out):,} held out; "
        f"the longest has {facts.prompt_tokens:,} tokens in its template"
      )
    if config.recipe == "gkd":
      return _check_pairs(facts, config, tokenizer, workdir)
    length = config.packing.length
    if facts.shape is not None:
      length = packing.row_length(length, facts.shape.max_positions)
    train_set, eval_set = sets.conversations(
      tokenizer,
      data=selection,
      held_out=held_out,
      layout=sets.Layout(**{**config.packing, "length": length}),
      batch_size=config.batch.size,
      seed=config.seed,
      workdir=workdir,
    )
  facts.steps_per_epoch = train_set.num_batches_per_epoch
  is_token_BT = train_set.batch(0)["segment_ids"] > 0
  facts.tokens_per_row = float(is_token_BT.sum(axis=1).mean())
  return (
    f"{facts.steps_per_epoch:,} batches of {config.batch.size} rows, filled to "
    f"{is_token_BT.mean():.0%}; {eval_set.num_batches_per_epoch:,} held out"
  )


def _check_pairs(
  facts: Facts,
  config: types.Config,
  tokenizer: chat.Tokenizer,
  workdir: pathlib.Path,
) -> str:
  """Reads prompts with completions as training does; returns a summary."""
  sampled = gkd_batches.max_new_tokens(config)
  train_set, eval_set = sets.completions(
    tokenizer,
    data=sets.Selection(**config.data),
    held_out=sets.HeldOut(**config.held_out),
    layout=sets.Layout(**config.packing),
    max_new_tokens=sampled,
    batch_size=config.batch.num_prompts,
    seed=config.seed,
    workdir=workdir,
  )
  if facts.shape is not None:
    packing.check_context(config.packing.length, facts.shape.max_positions)
  facts.steps_per_epoch = train_set.num_batches_per_epoch
  # A row holds its prompt and max(completion of the data, sampled) tokens.
  # Where the data's completion is longer, the excess counts as prompt.
  excess = np.maximum(train_set.num_completion_tokens - sampled, 0)
  prompts = train_set.num_prompt_tokens + excess
  facts.prompt_tokens = int(prompts.max())
  facts.tokens_per_row = float((prompts + sampled).mean())
  return (
    f"{facts.steps_per_epoch:,} batches of {config.batch.num_prompts} prompts; "
    f"with completions up to {facts.tokens_per_row:,.0f} tokens on average; "
    f"{eval_set.num_batches_per_epoch:,} held out"
  )


def _longest_prompt(
  config: types.Config,
  tokenizer: chat.Tokenizer,
  questions: Sequence[types.Question],
) -> int:
  """Returns the tokens of the longest prompt, without a probe."""

  def num_tokens(question: str) -> int:
    if "templates" in config:
      text = templates.fill(config.templates.teach, question=question, probe="")
    else:
      text = templates.fill(config.template, question=question)
    _, token_ids = chat.render(tokenizer, [types.Message("user", text)])
    return len(token_ids)

  texts = sorted((q.question for q in questions), key=len)
  return max(map(num_tokens, texts[-_NUM_LONGEST:]))


def _check_server(url: str) -> str:
  """Requests the health of a server; returns a summary."""

  async def ask() -> wire.Health:
    deadlines = client.Deadlines(
      generate_s=_SERVER_S, update_s=_SERVER_S, control_s=_SERVER_S
    )
    token = tokens.of_environment(os.environ)
    server = client.Client(url, deadlines=deadlines, token=token)
    try:
      return await server.health()
    finally:
      await server.close()

  health = asyncio.run(ask())
  return (
    f"{url} is {health.status}: {health.engine} with {health.model}, up to "
    f"{health.max_model_len:,} tokens"
  )
