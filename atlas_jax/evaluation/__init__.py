# SPDX-License-Identifier: Apache-2.0
"""Student alone against student taught."""
