# SPDX-License-Identifier: Apache-2.0
"""Prompts and completions of a request, in the forms of wire and engine.

These functions take time in proportion to the request: they run in a thread.
"""

from collections.abc import Sequence
import math
import reprlib

from atlas_jax import errors, types
from rollout import context_length, wire
from rollout.server import engine as engines
from rollout.server import refusal


def to_prompts(
  request: wire.GenerateRequest, engine: engines.Engine
) -> list[types.Prompt]:
  """Tokenizes prompts where needed, and validates their token ids.

  Raises:
    refusal.RefusalError: if a prompt is invalid.
  """
  prompts = []
  for i, prompt in enumerate(request.prompts):
    row_id = prompt.row_id or str(i)
    token_ids = _token_ids(prompt, row_id, engine)
    limit, vocab_size = engine.facts.max_model_len, engine.facts.vocab_size
    if not context_length.fits(len(token_ids), request.max_tokens, limit):
      raise _bad_prompt(
        row_id,
        f"{len(token_ids)} prompt tokens plus max_tokens={request.max_tokens} "
        f"do not fit max_model_len={limit}.",
      )
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
      raise _bad_prompt(row_id, f"Token ids must be in [0, {vocab_size}).")
    prompts.append(types.Prompt(row_id, prompt.text or "", tuple(token_ids)))
  return prompts


def to_json(
  request: wire.GenerateRequest,
  version: int,
  queue_s: float,
  groups: Sequence[Sequence[wire.CompletionOut]],
  engine: engines.Engine,
) -> bytes:
  """Returns a `wire.GenerateResponse` as JSON, with texts if requested.

  Raises:
    errors.RolloutError: if a log-probability is not finite.
  """
  _check_completions(groups, request)
  if request.with_text:
    groups = [
      [c.model_copy(update={"text": engine.decode(c.token_ids)}) for c in group]
      for group in groups
    ]
  head = wire.GenerateResponse(
    request_id=request.request_id,
    version=version,
    queue_s=queue_s,
    completions=[],
  ).model_dump_json(exclude={"completions"})
  # One completion at a time: the serializer does not release Python's lock, and
  # the event loop must run in between.
  rows = (
    f"[{','.join(c.model_dump_json() for c in group)}]" for group in groups
  )
  return f'{head[:-1]},"completions":[{",".join(rows)}]}}'.encode()


def _token_ids(
  prompt: wire.PromptIn, row_id: str, engine: engines.Engine
) -> list[int]:
  if (prompt.token_ids is None) == (prompt.text is None):
    raise _bad_prompt(row_id, "Exactly one of token_ids and text is required.")
  if prompt.token_ids is not None:
    return prompt.token_ids
  return engine.tokenize(prompt.text or "")


def _check_completions(
  groups: Sequence[Sequence[wire.CompletionOut]],
  request: wire.GenerateRequest,
) -> None:
  """Rejects non-finite log-probabilities."""
  for prompt, group in zip(request.prompts, groups, strict=True):
    for completion in group:
      numbers = [*completion.logprobs, *(completion.model_logprobs or ())]
      if not all(map(math.isfinite, numbers)):
        raise errors.RolloutError(
          "The engine returned non-finite log-probabilities.",
          where=f"row {reprlib.repr(prompt.row_id)}",
          why="The weights contain NaN or infinity, or activations overflow "
          "in this dtype.",
          fix="Start the server with --dtype=float32, or load an earlier "
          "checkpoint.",
        )


def _bad_prompt(row_id: str, why: str) -> refusal.RefusalError:
  return refusal.RefusalError(
    422,
    "prompt",
    what=f"Invalid prompt in row {reprlib.repr(row_id)}.",
    why=why,
    fix="Shorten or correct the prompt, or lower max_tokens.",
  )
