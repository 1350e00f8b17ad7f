"""Random numbers by position: any stretch of a stream at any time, the same on every device, rank and release.

``torch.Generator`` has other streams on other devices and cannot skip ahead. This is SplitMix64 (Steele, Lea and Flood,
*Fast splittable pseudorandom number generators*, OOPSLA 2014): word i is a hash of ``key + (i + 1) gamma``.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_of(*parts: object) -> int:
    """The stream's key for a seed, a name, ...: 64 bits of SHA-256 of them, signed."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words ``start`` to ``start + count - 1`` of the stream, int64 holding 64 random bits each."""
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) * _GAMMA + key
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def uniform(key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` numbers in [0, 1), float64."""
    return _shifted(words(key, 0, count, device), 11).double() * 2.0**-53


def signs(key: int, start: int, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows ``start`` onwards of an endless matrix of independent ±1 with ``columns`` columns, float32 [rows, columns].

    A row takes whole words, so a row is the same wherever a block begins.
    """
    per_row = -(-columns // 64)
    octets = words(key, start * per_row, rows * per_row, device).view(torch.uint8)
    byte = torch.arange(256, device=device)
    table = ((byte[:, None] >> torch.arange(8, device=device)) & 1).float() * 2 - 1  # the 8 signs of every byte
    return table.index_select(0, octets.int()).view(rows, per_row * 64)[:, :columns]
