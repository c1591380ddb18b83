"""The first filters of a token's sampling as one compiled function: repetition penalty, temperature, top-k.

`sampling.sample` takes `largest` in their place where these are what is asked for; it finds the same numbers, bit for bit,
without copying the logits. What it does not decide (equal logits at the edge, damaged ones) is left to the filters.
"""

from __future__ import annotations

# Numba infers the types of compiled functions
# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import njit

BLOCK = 64  # logits of which only the maximum is looked at first
INFINITE, SIGN = np.int32(0x7F800000), np.int32(0x7FFFFFFF)
LOWEST = np.int32(-(2**31))

compiled = njit(nogil=True, error_model="numpy")


@compiled
def key(bits):
    """A float32's bits as an integer of the same order; -0 as 0, NaN above all."""
    ordered = bits ^ ((bits >> np.int32(31)) & SIGN)
    ordered = SIGN if (bits & SIGN) > INFINITE else ordered
    return np.int32(0) if ordered == np.int32(-1) else ordered


@compiled
def scan(bits, count, keys, ids):
    """The `count` largest keys of a logit's bits, falling, and their ids (of equal ones the larger first); False: NaN or infinite."""
    size, held = len(bits), 0
    for first in range(0, size, BLOCK):
        last = min(size, first + BLOCK)
        top = LOWEST
        for at in range(first, last):
            top = max(top, key(bits[at]))
        if top >= INFINITE:
            return False
        if held == count and top < keys[count - 1]:
            continue
        for at in range(first, last):
            one = key(bits[at])
            if held == count and one < keys[count - 1]:
                continue
            place = min(held, count - 1)
            while place > 0 and keys[place - 1] <= one:
                keys[place], ids[place] = keys[place - 1], ids[place - 1]
                place -= 1
            keys[place], ids[place] = one, at
            held = min(count, held + 1)
    return True


@compiled
def largest(logits, seen, penalty, temperature, count, values, ids):
    """The `count` most likely ids into `ids`, falling, their logits after penalty and temperature into `values`.

    logits [N] float32: unchanged at the end. seen: distinct ids that get the `penalty` (1: none). values, ids: room for
    count + 1. False: the logits do not decide which are the largest, or hold NaN or infinity.
    """
    held = logits[seen]
    for at in range(len(seen)):
        logits[seen[at]] = held[at] * penalty if held[at] < 0 else held[at] / penalty
    keys = np.empty(count + 1, dtype=np.int32)
    found = scan(logits.view(np.int32), count + 1, keys, ids)
    for at in range(count + 1 if found else 0):
        values[at] = logits[ids[at]] / temperature
    for at in range(len(seen)):
        logits[seen[at]] = held[at]
    return found and values[0] > -np.inf and values[count] != values[count - 1]
