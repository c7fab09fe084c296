# SPDX-License-Identifier: Apache-2.0
"""Training objectives as pure functions of arrays."""
