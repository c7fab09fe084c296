# SPDX-License-Identifier: Apache-2.0
"""Weights between Flax parameters and Hugging Face directories."""
