# SPDX-License-Identifier: Apache-2.0
"""Checks a job and estimates its memory without an accelerator."""
