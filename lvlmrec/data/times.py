"""Timestamps of any type as sortable numbers. Unit and origin do not matter, only the order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lvlmrec import tables
from lvlmrec.errors import InputError

EARLIEST, LATEST = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds since 1970
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
DATES_SHARE = 0.9  # a column whose positive numbers are dates to this share at least is one of dates


def read(column: pa.ChunkedArray, name: str, label: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Sortable times [N], and whether each could be read, bool [N].

    Reads numbers in one unit, ISO 8601 dates, and every temporal type of Arrow but intervals. Raises `InputError` for
    other types, and as `check_units`.
    """
    column = tables.plain(column)
    kind = column.type
    if tables.is_text(kind):
        times, valid, are_dates = _of_texts(pc.utf8_trim_whitespace(tables.strings(column, name, label)))
    elif pa.types.is_null(kind):
        times, valid, are_dates = np.zeros(len(column)), np.zeros(len(column), dtype=bool), False
    else:
        numbers = _numbers(column)
        if numbers is None:
            raise InputError(f"{label}: column {name} holds {kind}; expected a number or a date")
        valid = numbers.is_valid().to_numpy(zero_copy_only=False)
        times = numbers.fill_null(0).to_numpy()
        valid &= np.isfinite(times)
        are_dates = pa.types.is_temporal(kind)
    if not are_dates:  # a date or a duration has a unit of its own
        check_units(times[valid], name, label)
    return times, valid


def check_units(times: NDArray[Any], name: str, label: str) -> None:
    """Raises `InputError` when the numbers `times` [N] are dates in more than one unit.

    They are dates if 90 % of the positive ones lie between 1990 and 2100 in seconds, milli-, micro- or nanoseconds.
    These four ranges are far apart, so ranks, counts and amounts also lie between them and are no dates.
    """
    if not len(times) or times.max() < 1000 * EARLIEST:
        return
    positive = times[times > 0]
    if positive.min() > times.max() * (EARLIEST / LATEST):
        return
    found = {}
    for unit, factor in UNITS.items():
        dates = positive[(positive >= EARLIEST * factor) & (positive < LATEST * factor)]
        if len(dates):
            found[unit] = dates
    if len(found) > 1 and sum(map(len, found.values())) >= DATES_SHARE * len(positive):
        examples = " and ".join(f"{unit} ({dates[0]})" for unit, dates in found.items())
        raise InputError(f"{label}: column {name} mixes dates in {examples}; write all in one unit")


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Numbers and Arrow's temporal types as numbers; None for other types."""
    kind = column.type
    if pa.types.is_decimal(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:  # fractions, or more than 64 bits
            return column.cast(pa.float64())
    if pa.types.is_float16(kind):
        return column.cast(pa.float64())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        return column.cast(pa.int32())
    is_known = pa.types.is_timestamp, pa.types.is_date64, pa.types.is_time64, pa.types.is_duration
    return column.cast(pa.int64()) if any(is_kind(kind) for is_kind in is_known) else None


def _of_texts(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.bool_], bool]:
    """Sortable times [N], whether each could be read [N], and whether they are dates, not numbers."""
    series = pd.Series(column.to_pandas())
    numbers = pd.to_numeric(series, errors="coerce")
    dates = pd.to_datetime(series, errors="coerce", utc=True, format="ISO8601") if numbers.isna().all() else None
    valid = np.array(numbers.notna() if dates is None else dates.notna())
    if dates is not None:
        return dates.astype("int64").to_numpy(), valid, True
    # parsed again without the unreadable ones, which would force nanoseconds into float64
    times = pd.to_numeric(series[valid]).to_numpy()
    if times.dtype == object:  # numbers of more than 64 bits, or of both signs and 64
        times = times.astype(np.float64)
    filled = np.zeros(len(series), dtype=times.dtype)
    filled[valid] = times
    return filled, valid & np.isfinite(filled.astype(np.float64)), False
