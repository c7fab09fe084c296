# SPDX-License-Identifier: Apache-2.0
"""A model to train: float32 parameters, bfloat16 compute, remat per block."""

import ml_collections

NO_THINKING = '{"enable_thinking": false}'


def get_config(
  path: str, chat_template_kwargs: str = ""
) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # scripts.job.components.open_model
    dict(
      path=path,  # Model folder, or owner/name[@revision] on the Hub.
      ignore_fields=(),  # Fields of config.json to treat as absent.
      # Empty: the tokenizer's; else chatml, none for plain text, or a file.
      chat_template="",
      # Arguments of the chat template, as JSON.
      chat_template_kwargs=chat_template_kwargs,
      dtype="bfloat16",  # Precision of activations: bfloat16 or float32.
      # Precision of parameters: float32, bfloat16, int8 or nf4.
      param_dtype="float32",
      attention="auto",  # Kernel: auto, reference, xla, cudnn or splash.
      # Rematerialization of activations: none, dots, block or offload.
      remat="block",
      unroll=1,  # Layers in one iteration of the compiled loop.
    )
  )
