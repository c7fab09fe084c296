# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer and a scripted sampler that tests share."""

from collections.abc import Callable, Sequence
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
import transformers

from atlas_jax import types

CHATML = (
  "{% for message in messages %}"
  "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The pre-tokenizer of Qwen2. transformers hard-codes it for checkpoints of that
# family and ignores tokenizer.json, so any other would load differently.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = (
  "What is 12 + 30? The answer is 42.",
  "system user assistant question teaching probe hint",
  "First add the tens, then add the ones.",
)


def write_tokenizer(
  directory: pathlib.Path, texts: Sequence[str] = _TEXTS
) -> transformers.PreTrainedTokenizerFast:
  """Writes a tokenizer in Hugging Face format and returns it.

  Byte-level BPE, so any text survives a round trip: three special tokens (ids 0
  to 2: pad `<|endoftext|>`, `<|im_start|>`, eos `<|im_end|>`), 256 bytes, and
  at most 41 merges learned from `texts`. Its chat template is ChatML.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=list(_SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token="<|endoftext|>",
    eos_token="<|im_end|>",
    extra_special_tokens=["<|im_start|>"],
    chat_template=CHATML,
  )
  fast.save_pretrained(directory)
  return fast


class FakeSampler:
  """A sampler with scripted completions that records its calls.

  `write(prompt, params, index)` returns the text of a completion. Prompts whose
  row ids are in `given_up` get no completions.
  """

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerBase,
    write: Callable[[types.Prompt, types.SamplingParams, int], str],
  ) -> None:
    self.version, self.context_length = 0, 2**20
    self.is_concurrent = False
    self.calls: list[tuple[list[types.Prompt], types.SamplingParams]] = []
    self.given_up: set[str] = set()
    self._tokenizer, self._write = tokenizer, write

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Returns encoded texts, truncated at `max_completion_tokens`."""
    self.calls.append((list(prompts), params))
    return [
      [
        self._complete(self._write(prompt, params, i), params)
        for i in range(params.group_size)
        if prompt.row_id not in self.given_up
      ]
      for prompt in prompts
    ]

  def update_weights(self, params: object, version: int) -> None:
    """Stores the version and ignores the weights."""
    del params
    self.version = version

  def take_metrics(self) -> dict[str, float]:
    """Returns no metrics."""
    return {}

  def _complete(
    self, text: str, params: types.SamplingParams
  ) -> types.Completion:
    token_ids = self._tokenizer.encode(text, add_special_tokens=False)
    token_ids.append(self._tokenizer.eos_token_id)
    kept = tuple(token_ids[: params.max_completion_tokens])
    return types.Completion(
      token_ids=kept,
      logprobs=(-0.5,) * len(kept),
      model_logprobs=(-1.0,) * len(kept),
      finish_reason="stop" if len(kept) == len(token_ids) else "length",
      version=self.version,
    )
