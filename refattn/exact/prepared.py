"""Keys and values of one head as the kernels read them: in tiles, with powers of two above their sizes, and without what is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rows import TILE
from .task import RANGE, Task


@dataclass(frozen=True)
class Prepared:
    """Keys and values of one batch and key-value head, padded with zeros to whole tiles.

    Attributes
    ----------
    k, v : ndarray
        (tile, D, TILE) and (channel tile, S, TILE); 0 where an entry is not finite.
    k_size, v_size : ndarray
        Power of two above each key's norm and each channel's largest value; a channel of zeros has size 0.
    bad : ndarray of bool
        Keys with an entry that is not finite.
    bad_v : ndarray of bool or None
        Entries of values that are not finite, (S, E); None where all are.
    """

    k: np.ndarray
    v: np.ndarray
    k_size: np.ndarray
    v_size: np.ndarray
    bad: np.ndarray
    bad_v: np.ndarray | None

    def spoilt(self, added: np.ndarray) -> np.ndarray:
        """Rows that see a key that is not finite."""
        bad = self.bad[: added.shape[1]]
        found: np.ndarray = (added[:, bad] != -np.inf).any(axis=-1) if bad.any() else np.zeros(len(added), np.bool_)
        return found

    def spoilt_channels(self, added: np.ndarray) -> np.ndarray:
        """Outputs that a value that is not finite takes part in: rows of `added` times channels."""
        if self.bad_v is None:
            return np.zeros((len(added), self.v_size.size), np.bool_)
        bad = self.bad_v[: added.shape[1]]
        return ((added != -np.inf)[:, : len(bad)].astype(np.float32) @ bad.astype(np.float32)) > 0.0


def columns_of(n_keys: int) -> int:
    """Keys rounded up to whole tiles."""
    return -(-n_keys // TILE) * TILE


def prepare(task: Task, b: int, g: int) -> Prepared:
    """Keys and values of a batch and key-value head."""
    k, v = task.k[b, g], task.v[b, g]
    bad, bad_v = ~np.isfinite(k).all(axis=1), ~np.isfinite(v)
    k_tiles, k_size = row_tiles(np.where(bad[:, None], 0.0, k))
    v_tiles, v_size = channels(np.where(bad_v, 0.0, v))
    return Prepared(
        k_tiles, v_tiles, k_size, v_size, np.concatenate([bad, np.zeros(len(k_size) - len(bad), np.bool_)]), bad_v if bad_v.any() else None
    )


def row_tiles(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as products read them, (tile, width, TILE), and their norms; what is not finite is 0."""
    out = np.zeros((columns_of(max(len(x), 1)), x.shape[1]))
    out[: len(x)] = np.nan_to_num(x, posinf=0.0, neginf=0.0)
    return np.ascontiguousarray(out.reshape(-1, TILE, x.shape[1]).transpose(0, 2, 1)), norms(out)


def channels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as sums of products read them, (channel tile, row, TILE), and powers of two above each channel's largest number, 0 where all are 0."""
    out = np.zeros((columns_of(max(len(x), 1)), columns_of(x.shape[1])))
    out[: len(x), : x.shape[1]] = x
    most = np.abs(out).max(axis=0)
    size = np.where(most == 0.0, 0.0, power_above(most, 2 * RANGE))
    return np.ascontiguousarray(out.reshape(len(out), -1, TILE).transpose(1, 0, 2)), size


def norms(x: np.ndarray) -> np.ndarray:
    """Powers of two above the Euclidean norms of rows; NaN for a row that is not finite."""
    with np.errstate(all="ignore"):
        most = np.abs(x).max(axis=-1, initial=0.0)
        scaled = x / np.where(most > 0.0, most, 1.0)[..., None]
        # every operation errs by u relatively (what underflows is below u of the largest square, 1): the factor covers any width below 2**40
        return power_above(most * np.sqrt(np.einsum("...d,...d->...", scaled, scaled)) * (1.0 + 2.0**-10), RANGE)


def power_above(x: np.ndarray, within: int) -> np.ndarray:
    """The power of two next above x >= 0, at least 2**-within; NaN from 2**RANGE on, where products might overflow."""
    exponent = np.where(x == 0.0, -within, np.clip(np.frexp(x)[1], -within, RANGE))
    return np.where(x < 2.0**RANGE, np.ldexp(1.0, exponent), np.nan)
