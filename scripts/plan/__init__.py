# SPDX-License-Identifier: Apache-2.0
"""Checks a run and estimates its memory without an accelerator."""
