"""Feature vectors made ready for cosines: centred on their mean and normalised, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Numbers of a block: 64 MiB in float64.
_BLOCK_NUMBERS = 1 << 23
# A row this close to the corpus mean, relative to the mean's length, points nowhere but along rounding noise.
_ZERO = 1e-6


class UnitRows:
    """Centred and normalised rows of a feature matrix, which may be a memory map larger than memory.

    Only a number a row is kept; vectors are made when they are asked for, and a row's vector is the same
    whichever block it is made in.
    """

    def __init__(self, features: np.ndarray, rows: np.ndarray | None) -> None:
        self.features = features
        self.rows = rows
        self.num_rows = len(features) if rows is None else len(rows)
        self.dim = features.shape[1]
        self._norms = np.full(self.num_rows, np.nan)
        self._mean = np.zeros(self.dim)
        self._measure()
        self.has_direction = np.isfinite(self._norms)
        """bool [n]; a row with a value that is not finite, or equal to the mean, has no direction."""

    def block(self, start: int, stop: int) -> np.ndarray:
        """Unit vectors of consecutive rows, float32 [stop - start, dim]; zeros without a direction."""
        return self._units(self.raw(start, stop), self._norms[start:stop])

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Unit vectors of any rows, float32 [len(ids), dim]; zeros without a direction."""
        return self._units(self.take_raw(ids), self._norms[ids])

    def raw(self, start: int, stop: int) -> np.ndarray:
        """The features of consecutive rows as they are."""
        return np.asarray(
            self.features[start:stop] if self.rows is None else self.features[self.rows[start:stop]]
        )

    def take_raw(self, ids: np.ndarray) -> np.ndarray:
        """The features of any rows as they are."""
        return np.asarray(self.features[ids if self.rows is None else self.rows[ids]])

    def bounds(self) -> Iterator[tuple[int, int]]:
        """First and last + 1 row of blocks of moderate size that cover all rows."""
        step = max(1, _BLOCK_NUMBERS // max(1, self.dim))
        for start in range(0, self.num_rows, step):
            yield start, min(start + step, self.num_rows)

    def _measure(self) -> None:
        finite = np.empty(self.num_rows, bool)
        for start, stop in self.bounds():
            block = self.raw(start, stop)
            finite[start:stop] = np.isfinite(block).all(axis=1)
            self._mean += block[finite[start:stop]].sum(axis=0, dtype=np.float64)
        self._mean /= max(1, int(finite.sum()))
        smallest = _ZERO * np.linalg.norm(self._mean)
        for start, stop in self.bounds():
            numbers = start + np.flatnonzero(finite[start:stop])
            norms = np.linalg.norm(self.take_raw(numbers).astype(np.float64) - self._mean, axis=1)
            self._norms[numbers] = np.where(norms > smallest, norms, np.nan)

    def _units(self, raw: np.ndarray, norms: np.ndarray) -> np.ndarray:
        directed = np.isfinite(norms)
        if directed.all():
            return self._divided(raw, norms)
        units = np.zeros(raw.shape, np.float32)
        units[directed] = self._divided(raw[directed], norms[directed])
        return units

    def _divided(self, raw: np.ndarray, norms: np.ndarray) -> np.ndarray:
        centred = raw.astype(np.float64)
        centred -= self._mean
        centred /= norms[:, None]
        return centred.astype(np.float32)


def unit_rows(features: np.ndarray, rows: np.ndarray | None = None) -> UnitRows:
    """Centre features on the mean of the rows that take part, and normalise them.

    Args:
        features: [N, dim] of any float type, possibly a memory map.
        rows: int64 [n], which rows of `features` take part; None for all. Row i of the result is
            `features[rows[i]]`.
    """
    return UnitRows(features, rows)
