# SPDX-License-Identifier: Apache-2.0
"""A model to train: float32 parameters, bfloat16 compute, remat per block."""

import ml_collections

NO_THINKING = '{"enable_thinking": false}'


def get_config(
  path: str, chat_template_kwargs: str = ""
) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # components.open_model
    dict(
      path=path,
      ignore_fields=(),
      chat_template_kwargs=chat_template_kwargs,
      dtype="bfloat16",
      param_dtype="float32",
      attention="auto",
      remat="block",
      unroll=1,
    )
  )
