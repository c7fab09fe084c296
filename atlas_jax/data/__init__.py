# SPDX-License-Identifier: Apache-2.0
"""Sources, formats, packing and the loader."""
