# SPDX-License-Identifier: Apache-2.0
"""Writes the small world: data, a tokenizer and models.

It has word problems with checkable answers, in the formats of real data and
models. Every recipe's `:smoke` variant runs in it.
"""

from collections.abc import Iterable, Mapping
import contextlib
import json
import pathlib
import shutil
import tempfile
from typing import Any

from absl import logging
import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
import transformers

from atlas_jax.data import word_problems
from atlas_jax.models import decoder, decoder_config
from atlas_jax.teaching import templates
from configs.data import world
from conversion import card, save

SIZES = {"train": 3000, "teacher": 2500, "questions": 1000}
HELD_OUT = {"validation": 100, "test": 400}
# A student and a teacher that the quickstart trained; see its README.md.
_TRAINED = pathlib.Path(__file__).with_name("world")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
  "{% for message in messages %}"
  "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen's pre-tokenizer, which transformers applies to these model types.
_SPLIT = tokenizers.Regex(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def ensure(directory: str) -> None:
  """Creates the world of the `:smoke` recipes unless it exists.

  Its student and teacher are copies of trained models.
  """
  target = pathlib.Path(directory)
  if target.exists():
    return
  logging.info("Writing the small world to %s.", directory)
  target.parent.mkdir(parents=True, exist_ok=True)
  # Complete or missing, also if two runs write it or one is stopped.
  with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
    world = pathlib.Path(scratch) / "world"
    world.mkdir()
    write(world, seed=0)
    for role in ("student", "teacher"):
      shutil.copytree(_TRAINED / role, world / role)
    with contextlib.suppress(OSError):  # Another run was faster.
      world.rename(target)


def write(directory: pathlib.Path, seed: int) -> None:
  """Writes the data, the tokenizer and both untrained models."""
  tokenizer = make_tokenizer(write_data(directory, seed))
  for role, family, num_layers in (
    ("student", "qwen2", 2),
    ("teacher", "qwen3", 3),
  ):
    write_model(
      directory / f"{role}_init",
      tokenizer,
      family,
      num_layers=num_layers,
      width=128,
      seed=seed,
    )


def write_data(directory: pathlib.Path, seed: int) -> list[str]:
  """Writes all data files; returns texts to train a tokenizer on."""
  prompts = templates.Templates(**world.get_templates().to_dict())
  seen: set[str] = set()
  sets = {}
  for i, (name, count) in enumerate((SIZES | HELD_OUT).items()):
    sets[name] = word_problems.problems(count, 100 * seed + i, excluded=seen)
    seen |= {problem.text for problem in sets[name]}
  questions = {"questions": [p.question() for p in sets["questions"]]}
  for i, name in enumerate(HELD_OUT):
    others = word_problems.paraphrases(
      sets[name], 100 * seed + i, excluded=seen
    )
    questions[name] = [
      problem.question(other)
      for problem, other in zip(sets[name], others, strict=True)
    ]
  for name, asked in questions.items():
    write_lines(directory / f"{name}.jsonl", map(vars, asked))

  student = [
    chat_row(_ask_student(prompts, row), row["reply"])
    for row in word_problems.student_rows(sets["train"], seed)
  ]
  teacher = [
    chat_row(
      templates.fill(
        prompts.teach, question=row["question"], probe=row["probe"]
      ),
      row["reply"],
    )
    for row in word_problems.teacher_rows(sets["teacher"], seed)
  ]
  write_lines(directory / "student_sft.jsonl", student)
  write_lines(directory / "teacher_sft.jsonl", teacher)
  rows = student[:4000] + teacher[:2000]
  return [turn["content"] for row in rows for turn in row["messages"]]


def _ask_student(prompts: templates.Templates, row: Mapping[str, str]) -> str:
  fields = {"question": row["question"]}
  if row["kind"] == "taught":
    fields["teaching"] = row["hint"]
  return templates.fill(getattr(prompts, row["kind"]), **fields)


def chat_row(prompt: str, reply: str) -> dict[str, Any]:  # Any: JSON.
  """Returns a row of training data with one question and its answer."""
  user = {"role": "user", "content": prompt}
  return {"messages": [user, {"role": "assistant", "content": reply}]}


def write_lines(
  path: pathlib.Path,
  rows: Iterable[Mapping[str, Any]],  # Any: JSON.
) -> None:
  """Writes one JSON object per line."""
  lines = [json.dumps(row) + "\n" for row in rows]
  path.write_text("".join(lines), encoding="utf-8")


def make_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
  """Trains a byte-level BPE that keeps most words whole."""
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(_SPLIT, "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=640,
    special_tokens=list(_SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(texts, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token=_SPECIAL[0], eos_token=_SPECIAL[2]
  )
  tokenizer.chat_template = CHAT_TEMPLATE
  return tokenizer


def write_model(
  directory: pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerFast,
  family: str,
  *,
  num_layers: int,
  width: int,
  seed: int,
) -> None:
  """Writes a randomly initialized checkpoint with four heads."""
  source = directory.with_name(f"{directory.name}.source")
  tokenizer.save_pretrained(source)
  fields = {
    "model_type": family,
    "vocab_size": len(tokenizer),
    "hidden_size": width,
    "intermediate_size": 3 * width,
    "num_hidden_layers": num_layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": width // 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "eos_token_id": tokenizer.eos_token_id,
    "pad_token_id": tokenizer.pad_token_id,
  }
  (source / "config.json").write_text(json.dumps(fields, indent=2))
  model = decoder.build(
    decoder_config.from_hf(fields),
    dtype="float32",
    attention="xla",
    remat="none",
    unroll=1,
  )
  save.save(
    directory,
    model.init(jax.random.key(seed)),
    model,
    source=source,
    dtype="float32",
    max_shard_bytes=10**9,
    about=card.Card(base="", facts={"Weights": "drawn at random"}),
    overwrite=True,
  )
