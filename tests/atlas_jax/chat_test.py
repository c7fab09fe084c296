# SPDX-License-Identifier: Apache-2.0
"""Tests tokenization, loss masks and tokenizer checks."""

import json

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors
import transformers

from atlas_jax import chat, errors, types
from tests import fakes

_LLAMA3 = (
  "{{ bos_token }}{% for message in messages %}"
  "<|start|>{{ message.role }}<|end|>\n\n{{ message.content | trim }}<|eot|>"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Removes the thinking of earlier turns and adds a block to the last turn.
_THINKING = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{% if message.role == 'assistant' and loop.last"
  " and '<think>' not in message.content %}<think>\n\n</think>\n\n{% endif %}"
  "{% if loop.last %}{{ message.content }}{% else %}"
  "{{ message.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
  "<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKED = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{% if message.role == 'assistant' %}{% generation %}"
  "{{ message.content }}<|im_end|>{% endgeneration %}"
  "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
  fakes.write_tokenizer(tmp_path)
  return chat.load_tokenizer(tmp_path)


def _messages(*contents, roles=("user", "assistant")):
  return [
    types.Message(roles[i % len(roles)], content)
    for i, content in enumerate(contents)
  ]


def _written(tokenizer, messages):
  """Returns the runs of trained tokens as text, special tokens included."""
  token_ids, loss_mask = chat.tokenize(tokenizer, messages)
  assert len(token_ids) == len(loss_mask)
  runs = []
  for i, (token_id, on) in enumerate(zip(token_ids, loss_mask, strict=True)):
    if on and (i == 0 or not loss_mask[i - 1]):
      runs.append([])
    if on:
      runs[-1].append(token_id)
  return [tokenizer.decode(run) for run in runs]


def test_render_ends_with_the_assistant_header(tokenizer):
  text, token_ids = chat.render(tokenizer, _messages("Hi {there}"))
  assert (
    text == "<|im_start|>user\nHi {there}<|im_end|>\n<|im_start|>assistant\n"
  )
  assert tokenizer.decode(token_ids) == text
  assert token_ids.count(tokenizer.eos_token_id) == 1


def test_mask_covers_only_answers_and_end_of_turn_tokens(tokenizer):
  messages = [
    types.Message("system", "Be brief."),
    *_messages("2 + 2?", "It is 4.", "And 3 + 3?", "It is 6."),
  ]
  assert _written(tokenizer, messages) == [
    "It is 4.<|im_end|>",
    "It is 6.<|im_end|>",
  ]
  token_ids, _ = chat.tokenize(tokenizer, messages)
  assert tokenizer.decode(token_ids) == tokenizer.apply_chat_template(
    [{"role": m.role, "content": m.content} for m in messages], tokenize=False
  )


def test_mask_follows_a_llama_3_template(tokenizer):
  tokenizer.add_special_tokens({"bos_token": "<|bos|>", "eos_token": "<|eot|>"})
  tokenizer.add_special_tokens(
    {"extra_special_tokens": ["<|start|>", "<|end|>"]}
  )
  tokenizer.chat_template = _LLAMA3
  messages = _messages("2 + 2?", "  It is 4.\n", "Sure?", "Yes.")
  assert _written(tokenizer, messages) == ["It is 4.<|eot|>", "Yes.<|eot|>"]
  token_ids, _ = chat.tokenize(tokenizer, messages)
  assert token_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("answer", ["", "\n\nOn a new line", " a", "12\n"])
def test_prompt_is_the_same_in_training_and_sampling(tokenizer, answer):
  _, prompt_ids = chat.render(tokenizer, _messages("Why?"))
  token_ids, loss_mask = chat.tokenize(tokenizer, _messages("Why?", answer))
  start = loss_mask.index(True)
  assert tuple(token_ids[:start]) == prompt_ids
  assert _written(tokenizer, _messages("Why?", answer)) == [
    answer + "<|im_end|>"
  ]


def test_thinking_is_trained_in_a_last_turn(tokenizer):
  tokenizer.chat_template = _THINKING
  thought = "<think>\nhm\n</think>\n\n4"
  assert _written(tokenizer, _messages("2 + 2?", thought)) == [
    thought + "<|im_end|>"
  ]


def test_turns_rendered_differently_before_the_last_are_found(tokenizer):
  tokenizer.chat_template = _THINKING
  assert _written(tokenizer, _messages("a", "b", "c", " d\n", "e", "f")) == [
    "b<|im_end|>",
    " d\n<|im_end|>",
    "<think>\n\n</think>\n\nf<|im_end|>",
  ]


def test_thinking_removed_by_the_template_is_rejected(tokenizer):
  tokenizer.chat_template = _THINKING
  with pytest.raises(errors.DataError, match="turn 2"):
    chat.tokenize(
      tokenizer, _messages("a", "<think>\nhm\n</think>\n\nb", "c", "d")
    )


@pytest.mark.parametrize(
  "messages",
  [
    _messages("2 + 2?", "It is 4."),
    _messages("a", "b\n", "c", " d", "e", "\u00e9 \U0001f600"),
    [types.Message("system", "s"), *_messages("a", "b", "c", "d")],
  ],
)
def test_mask_matches_a_template_with_generation_markers(tokenizer, messages):
  token_ids, loss_mask = chat.tokenize(tokenizer, messages)
  tokenizer.chat_template = _MARKED
  expected = tokenizer.apply_chat_template(
    [{"role": m.role, "content": m.content} for m in messages],
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  assert expected["assistant_masks"] == [int(on) for on in loss_mask]
  assert expected["input_ids"] == token_ids
  assert chat.tokenize(tokenizer, messages) == (token_ids, loss_mask)


def test_tokenizer_of_another_model_is_rejected(tokenizer):
  chat.check_vocabulary(tokenizer, len(tokenizer), "model")
  with pytest.raises(errors.ConfigError, match="vocab_size of 37"):
    chat.check_vocabulary(tokenizer, 37, "model")


def test_end_of_turn_is_trained_if_it_is_the_pad_token(tokenizer):
  tokenizer.pad_token = tokenizer.eos_token
  assert _written(tokenizer, _messages("a", "b")) == ["b<|im_end|>"]


def test_header_not_followed_by_the_answer_is_rejected(tokenizer):
  tokenizer.chat_template = fakes.CHATML.replace(
    "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
  )
  with pytest.raises(errors.DataError, match="turn 2"):
    chat.tokenize(tokenizer, _messages("a", "b"))


def test_tokenizer_adds_nothing_to_the_rendered_template(tokenizer):
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  assert tokenizer.encode("a")[0] == 0
  _, prompt_ids = chat.render(tokenizer, _messages("a"))
  token_ids, _ = chat.tokenize(tokenizer, _messages("a", "b"))
  assert 0 not in prompt_ids
  assert 0 not in token_ids


@pytest.mark.parametrize(
  ("template", "why"),
  [
    (fakes.CHATML.replace("<|im_end|>", ""), "ends no turn"),
    (fakes.CHATML.partition("{% if")[0], "ignores add_generation_prompt"),
  ],
)
def test_template_without_turn_borders_is_rejected(tokenizer, template, why):
  tokenizer.chat_template = template
  with pytest.raises(errors.ConfigError, match=why):
    chat.tokenize(tokenizer, _messages("a", "b"))


def test_template_error_is_reported(tokenizer):
  tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
  with pytest.raises(errors.DataError, match="no system turn"):
    chat.render(tokenizer, _messages("a"))


@pytest.mark.parametrize("contents", [(), ("only a question",)])
def test_conversation_without_an_answer_is_rejected(tokenizer, contents):
  with pytest.raises(errors.DataError):
    chat.tokenize(tokenizer, _messages(*contents))


def test_conversation_starting_with_the_answer_is_rejected(tokenizer):
  with pytest.raises(errors.DataError):
    chat.tokenize(tokenizer, _messages("a", roles=("assistant",)))


def test_tokenizer_that_adds_a_space_to_every_text_is_rejected():
  vocabulary = {"<unk>": 0, "</s>": 1, "\u2581": 2, "a": 3, "b": 4}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
  backend.normalizer = normalizers.Prepend("\u2581")
  backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
  )
  tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'user' %}a{{ m.content }}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
  )
  with pytest.raises(errors.ConfigError, match="in parts"):
    chat.tokenize(tokenizer, _messages("a", "b"))


def test_decode_is_the_inverse_of_encoding_without_special_tokens(tokenizer):
  text = "a , b  .\n\u00e9 don 't {x}"
  token_ids = tokenizer.encode(f"<|im_start|>{text}<|im_end|>")
  assert chat.decode(tokenizer, token_ids) == text


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    (None, (2,)),
    ({}, (2,)),
    ({"eos_token_id": 0}, (0, 2)),
    ({"eos_token_id": [2, 0, 7]}, (0, 2, 7)),
  ],
)
def test_stop_tokens_join_tokenizer_and_generation_config(
  tokenizer, tmp_path, config, expected
):
  if config is not None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
  assert chat.stop_token_ids(tokenizer, tmp_path) == expected


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": true}']
)
def test_invalid_generation_config_is_rejected(tokenizer, tmp_path, text):
  (tmp_path / "generation_config.json").write_text(text)
  with pytest.raises(errors.ConfigError, match=r"generation_config\.json"):
    chat.stop_token_ids(tokenizer, tmp_path)


@pytest.mark.parametrize("place", ["missing", "", "owner/name"])
def test_missing_tokenizer_is_reported(tmp_path, place):
  where = place if "/" in place else tmp_path / place
  with pytest.raises(errors.ConfigError, match="Failed to load") as info:
    chat.load_tokenizer(where)
  assert info.value.where == str(where)


@pytest.mark.parametrize("content", ['{"version": ', '{"a": 1}', "\x00", ""])
def test_invalid_tokenizer_file_is_reported(tmp_path, content):
  fakes.write_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text(content)
  with pytest.raises(errors.ConfigError, match="Failed to load"):
    chat.load_tokenizer(tmp_path)


def test_remote_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
  fakes.write_tokenizer(tmp_path / "model")
  path = tmp_path / "model/tokenizer_config.json"
  fields = json.loads(path.read_text())
  fields["tokenizer_class"] = "Own"
  fields["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
  path.write_text(json.dumps(fields))
  # Running the remote code, even after a terminal prompt, would write a file.
  canary = tmp_path / "ran"
  (tmp_path / "model/own.py").write_text(f"open({str(canary)!r}, 'w')")
  asked = []
  monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
  with pytest.raises(errors.ConfigError, match="Failed to load the tokenizer"):
    chat.load_tokenizer(tmp_path / "model")
  assert not canary.exists()
  assert asked == []


@pytest.fixture
def base(tmp_path):
  """A directory with the tokenizer of a base model: no template, no padding."""
  fakes.write_tokenizer(tmp_path)
  (tmp_path / "chat_template.jinja").unlink()
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  del config["pad_token"]
  path.write_text(json.dumps(config))
  return tmp_path


def test_a_missing_chat_template_is_reported_with_its_setting(base):
  with pytest.raises(errors.ConfigError, match="no chat template") as info:
    chat.load_tokenizer(base)
  assert "--config.model.chat_template" in info.value.fix
  assert chat.load_tokenizer(base, with_template=False).chat_template is None


@pytest.mark.parametrize(
  ("template", "expected"),
  [
    (
      "chatml",
      "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
      "<|im_start|>assistant\n[[a<|im_end|>]]\n<|im_start|>user\nr<|im_end|>\n"
      "<|im_start|>assistant\n[[b<|im_end|>]]\n",
    ),
    ("none", "s\nq\n[[a<|im_end|>]]r\n[[b<|im_end|>]]"),
    ("FILE", "s: s\nu: q\na: [[a<|im_end|>]]u: r\na: [[b<|im_end|>]]"),
  ],
)
def test_a_base_model_gets_a_template(base, template, expected):
  path = base / "own.jinja"
  path.write_text(
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
  )
  name = template.replace("FILE", str(path))
  tokenizer = chat.load_tokenizer(base, chat_template=name)
  messages = [types.Message("system", "s"), *_messages("q", "a", "r", "b")]
  token_ids, loss_mask = chat.tokenize(tokenizer, messages)
  assert chat.marked(tokenizer, token_ids, loss_mask) == expected
  prompt, prompt_ids = chat.render(tokenizer, messages[:2])
  assert prompt == expected.partition("[[")[0]
  assert tuple(token_ids[: len(prompt_ids)]) == prompt_ids


@pytest.mark.parametrize("template", ["chatml", "none"])
def test_templates_add_the_token_that_the_tokenizer_adds(base, template):
  tokenizer = chat.load_tokenizer(base, with_template=False)
  tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
  )
  tokenizer.save_pretrained(base)
  tokenizer = chat.load_tokenizer(base, chat_template=template)
  token_ids, loss_mask = chat.tokenize(tokenizer, _messages("q", "a"))
  text = chat.marked(tokenizer, token_ids, loss_mask)
  assert text.startswith("<|bos|>")
  assert text.count("<|bos|>") == 1
  token_ids, loss_mask = chat.tokenize_text(tokenizer, "q")
  assert chat.marked(tokenizer, token_ids, loss_mask) == (
    "<|bos|>[[q<|im_end|>]]"
  )


def test_an_unreadable_template_is_reported(base):
  with pytest.raises(errors.ConfigError, match="chat template") as info:
    chat.load_tokenizer(base, chat_template="chat-ml")
  assert "FileNotFoundError" in info.value.why
  assert "chatml" in info.value.fix


def test_all_tokens_of_a_text_but_the_first_are_trained(tokenizer):
  token_ids, loss_mask = chat.tokenize_text(tokenizer, "4 5 6")
  assert chat.marked(tokenizer, token_ids, loss_mask) == "4[[ 5 6<|im_end|>]]"
  # A text that ends with the token gets no second one.
  assert chat.tokenize_text(tokenizer, "4 5 6<|im_end|>") == (
    token_ids,
    loss_mask,
  )


def test_tokenizer_without_eos_is_rejected(tmp_path):
  fakes.write_tokenizer(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  del config["eos_token"]
  path.write_text(json.dumps(config))
  with pytest.raises(errors.ConfigError, match="no eos_token"):
    chat.load_tokenizer(tmp_path)


# Like Qwen3's: thinking is on unless it is switched off.
_SWITCHED = fakes.CHATML.replace(
  "assistant\n{% endif %}",
  "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
  "{% endif %}{% endif %}",
)


def test_template_variables_get_defaults(tokenizer, tmp_path):
  tokenizer.chat_template = _SWITCHED
  tokenizer.save_pretrained(tmp_path)
  off = chat.load_tokenizer(
    tmp_path, template_kwargs='{"enable_thinking": false, "other": null}'
  )
  text, _ = chat.render(off, _messages("Hi"))
  assert text.endswith("<think>\n\n</think>\n\n")
  assert chat.render(tokenizer, _messages("Hi"))[0] == text.partition("<th")[0]
  # A value that is passed replaces the default.
  passed = off.apply_chat_template(
    [{"role": "user", "content": "Hi"}],
    tokenize=False,
    add_generation_prompt=True,
    enable_thinking=True,
  )
  assert "<think>" not in passed
  assert chat.fingerprint(off) != chat.fingerprint(tokenizer)


@pytest.mark.parametrize("kwargs", ["{", "[1]", '{"a b": 1}', '{"": 1}'])
def test_template_variables_must_be_a_json_object(tokenizer, tmp_path, kwargs):
  del tokenizer
  with pytest.raises(errors.ConfigError, match="JSON object"):
    chat.load_tokenizer(tmp_path, template_kwargs=kwargs)


@pytest.mark.parametrize(
  ("text", "is_open", "outside", "is_thinking"),
  [
    ("a <think>t</think> b", False, "a  b", False),
    ("t</think> b", True, "b", False),
    ("t</think> b", False, "b", False),
    ("<think>t</think>b", True, "b", False),
    ("<think>t", False, "", True),
    ("t", True, "", True),
    ("", True, "", True),
    ("a", False, "a", False),
    ("<think>t</think>b<think>u", False, "b", True),
    ("<thinking>t</think> u</thinking>b", False, "b", False),
  ],
)
def test_thinking_is_left_out(text, is_open, outside, is_thinking):
  assert chat.without_thinking(text, is_open=is_open) == outside
  assert chat.is_thinking(text, is_open=is_open) == is_thinking


def test_a_prompt_that_opens_the_thinking_is_recognized():
  assert chat.opens_thinking("<|assistant|>\n<think>\n")
  assert not chat.opens_thinking("What does <think> mean?<|assistant|>\n")


def test_thinking_tags_that_are_special_tokens_are_decoded(tokenizer):
  tokenizer.add_special_tokens(
    {"extra_special_tokens": ["<think>", "</think>"]}
  )
  text = "<think>t</think>b"
  token_ids = tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
  assert chat.decode(tokenizer, token_ids) == text
