# SPDX-License-Identifier: Apache-2.0
"""Section `optimizer`: AdamW, and settings of the other choices of `name`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.optimizer.make_optimizer
      name="adamw",  # Optimizer: adamw, lion, adafactor or muon.
      max_grad_norm=1.0,  # Norm to clip gradients to; 0.0: no clipping.
      weight_decay=0.0,  # Decoupled weight decay, times the learning rate.
      not_decayed=(
        r".*/(scale|bias)",
      ),  # Parameters without decay, as regexes.
      frozen=(),  # Parameters that are not trained, as regexes.
      rounding="nearest",  # Or stochastic, for parameters in bfloat16.
      adamw=dict(  # train.optimizer._adamw
        beta1=0.9,  # Decay of the first moment.
        beta2=0.999,  # Decay of the second moment.
        epsilon=1e-8,  # Added to the root of the second moment.
      ),
      lion=dict(  # train.optimizer._lion
        beta1=0.9,  # Weight of the momentum in the update.
        beta2=0.99,  # Decay of the momentum.
      ),
      adafactor=dict(  # train.optimizer._adafactor
        decay_exponent=0.8,  # The second moment's decay is 1 - step^-x.
      ),
      muon=dict(  # train.optimizer._muon
        momentum=0.95,  # Decay of the momentum of matrices.
        beta1=0.9,  # AdamW of other parameters: first moment.
        beta2=0.95,  # AdamW of other parameters: second moment.
        epsilon=1e-8,  # AdamW of other parameters: epsilon.
      ),
    )
  )
