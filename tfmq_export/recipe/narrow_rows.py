"""Rows of temporal tables in fewer bytes: fp16, or int8 codes with one scale per row.

    row_t  ~  s_t q_t        q_t = round(row_t / s_t), s_t = max |row_t| / 127

Scales are rounded to 16 bits, so that ``s q`` is exact in fp32: narrowing what is narrow already changes nothing.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tfmq_export.recipe.recipe import TableType, TemporalTable, TibRecipe

SMALLEST = 2.0**-100

LEAST_VALUES = 16
"""In a row; below, there is nothing to save and often a factor of the whole prediction to lose."""


def obstacle(table: TemporalTable, stored: TableType) -> str | None:
    """Why a table stays in fp32; None if it does not."""
    if table.rows[0].size < LEAST_VALUES:
        return f"{table.rows[0].size} values a row"
    if np.array_equal(table.rows, np.round(table.rows)):
        return "whole numbers, as masks and indices are"
    if stored == "fp16" and np.abs(table.rows).max() > np.finfo(np.float16).max:
        return "beyond the range of fp16"
    return None


def encode(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes, and the scale of each row.

    Args:
        rows: [T, *feature].
    Returns:
        int8 [T, *feature] and float32 [T, 1, ...].
    """
    largest = np.abs(rows.astype(np.float64)).max(tuple(range(1, rows.ndim)), keepdims=True)
    # A row of zeros, or of what fp32 cannot hold a step of, is zeros on any scale.
    mantissa, exponent = np.frexp(np.where(largest > SMALLEST, largest / 127, 1.0))
    scales = np.ldexp(np.round(np.ldexp(mantissa, 16)), exponent - 16)
    return np.clip(np.round(rows / scales), -127, 127).astype(np.int8), scales.astype(np.float32)


def decode(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows as the graph serves them."""
    return codes.astype(np.float32) * scales


def narrow(tib: TibRecipe, stored: TableType) -> TibRecipe:
    """The tables as they are served when their rows are stored in ``stored``."""
    return replace(tib, tables=tuple(narrowed(table, stored) for table in tib.tables), stored=stored)


def narrowed(table: TemporalTable, stored: TableType) -> TemporalTable:
    """One table as it is served."""
    if stored == "fp32" or obstacle(table, stored) is not None:
        return table
    if stored == "fp16":
        return replace(table, rows=table.rows.astype(np.float16).astype(np.float32))
    return replace(table, rows=decode(*encode(table.rows)))


def stored_bytes(tib: TibRecipe) -> int:
    """Of all tables, scales included."""
    return sum(_bytes(table, tib.stored) for table in tib.tables)


def _bytes(table: TemporalTable, stored: TableType) -> int:
    if stored == "fp32" or obstacle(table, stored) is not None:
        return table.rows.nbytes
    return table.rows.nbytes // 2 if stored == "fp16" else table.rows.size + 4 * len(table.rows)
