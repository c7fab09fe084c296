# SPDX-License-Identifier: Apache-2.0
"""Section `optimizer`: AdamW, and settings of the other choices of `name`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.optimizer.make_optimizer
      name="adamw",
      max_grad_norm=1.0,
      weight_decay=0.0,
      not_decayed=(r".*/(scale|bias)",),
      frozen=(),
      rounding="nearest",  # "stochastic" for parameters in bfloat16.
      adamw=dict(beta1=0.9, beta2=0.999, epsilon=1e-8),
      lion=dict(beta1=0.9, beta2=0.99),
      adafactor=dict(decay_exponent=0.8),
      muon=dict(momentum=0.95, beta1=0.9, beta2=0.95, epsilon=1e-8),
    )
  )
