# SPDX-License-Identifier: Apache-2.0
"""Evaluation of the student with and without a teaching."""
