# SPDX-License-Identifier: Apache-2.0
"""The models of the protocol: how they are asked, and how they are read."""

from collections.abc import Sequence
import dataclasses

from absl import logging

from atlas_jax import chat, errors, types

# Token ids, and why they ended.
_Text = tuple[tuple[int, ...], types.FinishReason]

# Ends the thinking of a model that has used its budget.
_STOP_THINKING = "\n</think>\n\n"


@dataclasses.dataclass(frozen=True)
class Role:
  """A sampler, the tokenizer of its weights, and limits of its texts.

  Attributes:
    sampler: of the model.
    tokenizer: of the model.
    max_prompt_tokens: longer prompts are dropped; 0 for as many as fit into the
      context together with the completion.
    max_thinking_tokens: of `write`: the model thinks for at most this many
      tokens, and `max_completion_tokens` limits what follows. With 0,
      `max_completion_tokens` limits both together.
  """

  sampler: types.Sampler
  tokenizer: chat.Tokenizer
  max_prompt_tokens: int = 0
  max_thinking_tokens: int = 0

  def __post_init__(self) -> None:
    """Validates the limits."""
    for name in ("max_prompt_tokens", "max_thinking_tokens"):
      if getattr(self, name) < 0:
        raise errors.ConfigError(
          f"{name} must be >= 0, got {getattr(self, name)}.",
          where=f"--config.roles, {name}",
          why="It is a number of tokens; 0 sets no limit.",
          fix="Set it to 0 or more.",
        )

  def prompt(self, row_id: str, text: str) -> types.Prompt:
    """Renders one user turn with the chat template."""
    rendered, token_ids = chat.render(
      self.tokenizer, [types.Message("user", text)]
    )
    return types.Prompt(row_id=row_id, text=rendered, token_ids=token_ids)

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Samples completions; see `types.Sampler`.

    A prompt that is too long has an empty list, like one that the sampler
    dropped.
    """
    return self._sample(prompts, params, params.max_completion_tokens)

  def text(self, completion: types.Completion) -> str:
    """Returns the whole text of a completion, with its thinking."""
    return chat.decode(self.tokenizer, completion.token_ids)

  def read(self, prompt: types.Prompt, token_ids: Sequence[int]) -> str:
    """Returns the text of a completion without its thinking."""
    return chat.without_thinking(
      chat.decode(self.tokenizer, token_ids),
      is_open=chat.opens_thinking(prompt.text),
    )

  def write(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[tuple[types.Attempt, ...]]:
    """Samples texts without their thinking, which may have its own budget.

    Returns:
      `params.group_size` ungraded texts per prompt; an empty tuple for a prompt
      that was dropped. A text is empty if the model was still thinking.
    """
    groups: list[list[_Text]]
    if self.max_thinking_tokens:
      groups = self._write_in_budget(prompts, params)
    else:
      groups = [
        [(c.token_ids, c.finish_reason) for c in group]
        for group in self.sample(prompts, params)
      ]
    written = [
      tuple(
        types.Attempt(self.read(prompt, token_ids), len(token_ids), reason)
        for token_ids, reason in group
      )
      for prompt, group in zip(prompts, groups, strict=True)
    ]
    _warn_if_unfinished(written)
    return written

  def _write_in_budget(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[_Text]]:
    r"""Samples the thinking, then continues what the budget cut.

    A completion that is still thinking continues after `_STOP_THINKING`:

      prompt <think> t t t ... t  \n</think>\n\n  a a a <end>
                     at most max_thinking_tokens  at most max_completion_tokens

    Returns:
      Token ids and finish reasons. A group is empty if its prompt, or the
      continuation of one of its members, was dropped.
    """
    stop = self.tokenizer.encode(_STOP_THINKING, add_special_tokens=False)
    begun = self._sample(
      prompts,
      dataclasses.replace(
        params, max_completion_tokens=self.max_thinking_tokens
      ),
      self.max_thinking_tokens + len(stop) + params.max_completion_tokens,
    )
    cut = {}
    for prompt, group in zip(prompts, begun, strict=True):
      for i, completion in enumerate(group):
        if completion.finish_reason == "length":
          text = chat.decode(self.tokenizer, completion.token_ids)
          is_open = chat.is_thinking(
            text, is_open=chat.opens_thinking(prompt.text)
          )
          first = (*completion.token_ids, *(stop if is_open else ()))
          cut[prompt.row_id, i] = (
            first,
            types.Prompt(
              f"{prompt.row_id}/{i}", "", (*prompt.token_ids, *first)
            ),
          )
    ends = self.sampler.sample(
      [prompt for _, prompt in cut.values()],
      dataclasses.replace(params, group_size=1),
    )
    ended = dict(zip(cut, ends, strict=True))

    def whole(
      key: tuple[str, int], completion: types.Completion
    ) -> list[_Text]:
      if key not in cut:
        return [(completion.token_ids, completion.finish_reason)]
      first, _ = cut[key]
      return [((*first, *e.token_ids), e.finish_reason) for e in ended[key]]

    groups = []
    for prompt, group in zip(prompts, begun, strict=True):
      parts = [whole((prompt.row_id, i), c) for i, c in enumerate(group)]
      groups.append([part[0] for part in parts] if all(parts) else [])
    return groups

  def _sample(
    self,
    prompts: Sequence[types.Prompt],
    params: types.SamplingParams,
    num_new: int,
  ) -> list[list[types.Completion]]:
    """Samples for the prompts that leave room for `num_new` tokens."""
    limit = self.sampler.context_length - num_new
    if limit < 1:
      raise errors.ConfigError(
        f"{num_new} new tokens leave no room for a prompt.",
        where="--config.sampling, max_completion_tokens",
        why=f"The model's context, or its servers' max_model_len, has "
        f"{self.sampler.context_length} tokens.",
        fix="Lower max_completion_tokens or roles.student.max_thinking_tokens, "
        "or raise max_model_len if the model allows it.",
      )
    if self.max_prompt_tokens:
      limit = min(limit, self.max_prompt_tokens)
    fits = [0 < len(prompt.token_ids) <= limit for prompt in prompts]
    fitting = [p for p, fit in zip(prompts, fits, strict=True) if fit]
    if len(fitting) < len(prompts):
      longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
      logging.warning(
        "Dropped %d of %d prompts: they must have 1 to %d tokens; row %s has "
        "%d.",
        len(prompts) - len(fitting),
        len(prompts),
        limit,
        longest.row_id,
        len(longest.token_ids),
      )
    groups = iter(self.sampler.sample(fitting, params) if fitting else ())
    return [next(groups) if fit else [] for fit in fits]


def _warn_if_unfinished(groups: Sequence[Sequence[types.Attempt]]) -> None:
  """Warns if most of the texts ended while the model was thinking."""
  written = [attempt for group in groups for attempt in group]
  num_unfinished = sum(
    not attempt.text and attempt.finish_reason == "length"
    for attempt in written
  )
  if num_unfinished > len(written) / 2:
    logging.warning(
      "%d of %d texts of the student ended while it was thinking: no text is "
      "left. Set --config.roles.student.max_thinking_tokens, or switch "
      "thinking off with --config.student.chat_template_kwargs='"
      '{"enable_thinking": false}\'.',
      num_unfinished,
      len(written),
    )
