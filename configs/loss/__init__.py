# SPDX-License-Identifier: Apache-2.0
"""Policy losses: settings of one objective, by name."""
