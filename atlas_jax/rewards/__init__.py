# SPDX-License-Identifier: Apache-2.0
"""Answer extraction, answer comparison and rewards."""
