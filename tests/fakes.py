# SPDX-License-Identifier: Apache-2.0
"""Small real things which tests share."""

from collections.abc import Sequence
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
import transformers

CHATML = (
  "{% for message in messages %}"
  "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's split. transformers rebuilds it from its own code for a checkpoint of
# that family, whatever tokenizer.json says; any other would load differently.
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
