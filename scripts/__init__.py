# SPDX-License-Identifier: Apache-2.0
"""Command-line entry points."""

import os

# Only its tokenizers are used; it need not advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
