# SPDX-License-Identifier: Apache-2.0
"""The teaching protocol (probe, teach, solve) and its prompt templates."""
