# SPDX-License-Identifier: Apache-2.0
"""Converts weights between Flax parameters and Hugging Face directories."""
