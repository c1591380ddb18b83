"""The model's forward step on CPUs as one compiled function: every weight is read once for all rows.

`forward` is what `compiled.CompiledStep` calls. A row is one new token of one slot of the key-value cache. Its result depends on the row's own numbers alone: each sum runs
over one row in a fixed order (`vectors`), and attention reads one slot. So one seed gives one text in any company, and
the tokens of a prompt are rows of one slot that are read in one call.

Threads share the outputs of each matrix and the heads of attention; they meet at a barrier before the next matrix and
sleep while they wait. The order of sums does not depend on their number either.
"""

from __future__ import annotations

# Numba infers the types of compiled functions and gives intrinsics their first argument
# mypy: disable-error-code="no-untyped-def, call-arg"
import os

import numpy as np
from numba import njit, types

from inference.vectors import VNNI, WIDTH, exponent, make_dots, read, weighted_sum, write

OUTPUTS = 8  # computed at a time, so that a row's numbers are loaded once for all of them
# Sixteen sums of vectors fit the registers of AVX-512, twelve those of AVX2 and NEON, with integers eight.
WIDE = WIDTH == 16
HALF_OUTPUTS = OUTPUTS // 2  # so many where several rows are read together
ONE, SINGLE = make_dots(1, OUTPUTS, prefetch=True), make_dots(1, 1)
LAST, PAIR, THREE, FOUR = (make_dots(rows, HALF_OUTPUTS, prefetch=True) for rows in (1, 2, 3, 4))

F = np.float32
LOG2E, LN2_HIGH, LN2_LOW = F(1.44269504088896341), F(0.693359375), F(-2.12194440e-4)
P0, P1, P2, P3, P4, P5 = (
    F(value) for value in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)
LOWEST, HIGHEST, HALF, UNIT = F(-87.0), F(88.0), F(0.5), F(1.0)
GELU_1, GELU_3 = F(-2 * 0.7978845608028654), F(-2 * 0.7978845608028654 * 0.044715)
EPSILON, TINY, LARGEST = F(1e-5), F(1e-30), F(127.0)
SHIFT = 128 if VNNI else 0  # what vpdpbusd wants added to a row's int8 numbers
ROUNDED = np.uint8 if VNNI else np.int16  # how a row's int8 numbers are held
ROUNDED_SIZE = 1 if VNNI else 2
NONE = -1

# Columns of the table of a layer: addresses of matrices, then places in `vectors` (NONE: the model has no such bias).
ATTN, PROJ, FC, MLP = 0, 1, 2, 3
BIAS = 4  # after each matrix
SCALE = 8  # after each int8 matrix: a scale for each output, then the sum of its weights
LN_1, LN_1_BIAS, LN_2, LN_2_BIAS = 12, 13, 14, 15
FIELDS = 16
LOOKS = 10_000  # times that a thread looks for the others before it sleeps, some 20 µs

if os.name == "posix":
    lock = types.ExternalFunction("pthread_mutex_lock", types.int32(types.int64))
    unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))
    wait = types.ExternalFunction("pthread_cond_wait", types.int32(types.int64, types.int64))
    broadcast = types.ExternalFunction("pthread_cond_broadcast", types.int32(types.int64))
    look = types.ExternalFunction("pthread_self", types.int64())
    COMPILED_BARRIER = True
else:
    COMPILED_BARRIER = False

compiled = njit(nogil=True, error_model="numpy")


@compiled
def exp(x):
    """e to the x in float32, to the last bit or two (Moshier's Cephes, expf); the range is cut to -87 to 88."""
    if x < LOWEST:
        x = LOWEST
    if x > HIGHEST:
        x = HIGHEST
    power = np.floor(x * LOG2E + HALF)
    x = x - power * LN2_HIGH - power * LN2_LOW
    y = ((((P0 * x + P1) * x + P2) * x + P3) * x + P4) * x + P5
    return (y * (x * x) + x + UNIT) * exponent(np.int32(power))


@compiled
def meet(team, threads):
    """Wait until all threads are here. team: [arrived, round, 16 numbers of mutex, 16 of condition].

    A thread that waits looks LOOKS times whether the others have come, and then sleeps: to be woken takes longer than most
    of these waits, and longer looking would be in vain where another program has a core (docs/experiments.md).
    """
    if COMPILED_BARRIER and threads > 1:
        mutex = team.ctypes.data + 16
        condition = mutex + 128
        lock(mutex)
        round = team[1]
        team[0] += 1
        if team[0] == threads:
            team[0] = 0
            team[1] += 1
            broadcast(condition)
        else:
            unlock(mutex)
            looks = 0
            while looks < LOOKS and team[1] == round:
                look()  # does nothing, but the compiler cannot know, so that `team` is read again
                looks += 1
            lock(mutex)
            while team[1] == round:
                wait(condition, mutex)
        unlock(mutex)


@compiled
def share(count, thread, threads, step):
    """(first, last + 1) of the thread's part of `count`, cut at multiples of `step`."""
    blocks = (count + step - 1) // step
    return min(count, blocks * thread // threads * step), min(count, blocks * (thread + 1) // threads * step)


@compiled
def multiply(token, w, size, inside, outputs, x, x_stride, x_size, rows, y, y_stride):
    """y[r, n] = sum of w[n, k] x[r, k]: addresses, strides in numbers, `size` and `x_size` bytes a number."""
    n = 0
    while n + OUTPUTS <= outputs:
        if rows == 1:
            block = w + n * inside * size
            ONE(
                token,
                block,
                inside,
                x,
                x_stride,
                inside,
                y + n * 4,
                y_stride,
                block + OUTPUTS * inside * size,
                OUTPUTS * size,
            )
        else:
            for half in range(n, n + OUTPUTS, HALF_OUTPUTS):
                block = w + half * inside * size
                several(token, block, size, inside, x, x_stride, x_size, rows, y + half * 4, y_stride)
        n += OUTPUTS
    while n < outputs:
        for row in range(rows):
            source, target = x + row * x_stride * x_size, y + (row * y_stride + n) * 4
            SINGLE(token, w + n * inside * size, inside, source, x_stride, inside, target, y_stride, 0, 0)
        n += 1


@compiled
def several(token, w, size, inside, x, x_stride, x_size, rows, y, y_stride):
    """HALF_OUTPUTS outputs of several rows, a few rows at a time.

    Each group of rows asks for its share of the weights that come OUTPUTS further on, so that memory is asked evenly.
    """
    groups = (rows + 3) // 4 if WIDE else (rows + 1) // 2 if size == 1 else (rows + 2) // 3
    step = (HALF_OUTPUTS * size + groups - 1) // groups
    later, end = w + OUTPUTS * inside * size, w + (OUTPUTS + HALF_OUTPUTS) * inside * size
    row = 0
    while row < rows:
        source, target, left = x + row * x_stride * x_size, y + row * y_stride * 4, rows - row
        if WIDE and left >= 4:
            FOUR(token, w, inside, source, x_stride, inside, target, y_stride, later, step)
            row += 4
        elif not WIDE and size > 1 and left >= 3 and left != 4:  # four as two pairs
            THREE(token, w, inside, source, x_stride, inside, target, y_stride, later, step)
            row += 3
        elif left >= 2:
            PAIR(token, w, inside, source, x_stride, inside, target, y_stride, later, step)
            row += 2
        else:
            LAST(token, w, inside, source, x_stride, inside, target, y_stride, later, step)
            row += 1
        later = min(later + step * inside, end)


@compiled
def prepare(size, work, place, width, rows, numbers, scales):
    """With int8 weights: rows of float32 at `place` of `work` as int8 in `numbers`, each with its own scale."""
    for row in range(rows if size == 1 else 0):
        x = work[place + row * width : place + (row + 1) * width]
        largest = TINY
        for k in range(width):
            largest = max(largest, abs(x[k]))
        scales[row] = largest / LARGEST
        factor = LARGEST / largest
        out = numbers[row * width : (row + 1) * width]
        for k in range(width):
            out[k] = ROUNDED(np.int32(np.floor(x[k] * factor + HALF)) + SHIFT)


@compiled
def finish(size, work, place, stride, rows, first, count, vectors, bias, scale, outputs, scales):
    """Scale integer sums (int8) and add the bias, for outputs `first` and on; the result stays where the sums are."""
    for row in range(rows):
        y = work[place + row * stride : place + row * stride + count]
        if size == 1:
            sums = y.view(np.int32)
            by = vectors[scale + first : scale + first + count]
            weights = vectors[scale + outputs + first : scale + outputs + first + count]
            factor = scales[row]
            for n in range(count):
                y[n] = F(sums[n] - np.int32(SHIFT) * np.int32(weights[n])) * (by[n] * factor)
        if bias != NONE:
            add = vectors[bias + first : bias + first + count]
            for n in range(count):
                y[n] += add[n]


@compiled
def linear(state, t, which, outputs, first, last, x, inside, rows, y, stride):
    """Outputs `first` to `last` of a layer's matrix `which`. x [rows, inside] and y [rows, stride] are places in `work`.

    y holds output `first` in its first column. state: what is the same for all calls, see `forward`. With int8 weights
    its `numbers` and `scales` hold the rounded rows.
    """
    token, size, vectors, work, numbers, scales = state
    base, count = work.ctypes.data, last - first
    source, x_size = (numbers.ctypes.data, ROUNDED_SIZE) if size == 1 else (base + x * 4, 4)
    w = t[which] + first * inside * size
    multiply(token, w, size, inside, count, source, inside, x_size, rows, base + y * 4, stride)
    bias, scale = t[which + BIAS], t[which + SCALE]
    finish(size, work, y, stride, rows, first, count, vectors, bias, scale, outputs, scales)


@compiled
def normalise(work, x, y, width, rows, vectors, weight, bias, ones):
    """LayerNorm (Ba et al. 2016) of rows at place x, to place y."""
    base = work.ctypes.data
    moment = np.empty(1, dtype=np.float32)
    to = moment.ctypes.data
    for row in range(rows):
        SINGLE(F(0), base + ones * 4, 0, base + (x + row * width) * 4, 0, width, to, 0, 0, 0)
        mean = moment[0] / F(width)
        source, out = work[x + row * width : x + (row + 1) * width], work[y + row * width : y + (row + 1) * width]
        for k in range(width):
            out[k] = source[k] - mean
        at = base + (y + row * width) * 4
        SINGLE(F(0), at, 0, at, 0, width, to, 0, 0, 0)
        factor = UNIT / np.sqrt(moment[0] / F(width) + EPSILON)
        by = vectors[weight : weight + width]
        for k in range(width):
            out[k] = out[k] * factor * by[k]
        if bias != NONE:
            add = vectors[bias : bias + width]
            for k in range(width):
                out[k] += add[k]


@compiled
def gelu(work, place, stride, count, rows):
    """GPT-2's tanh GELU in place: x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))."""
    for row in range(rows):
        x = work[place + row * stride : place + row * stride + count]
        for k in range(count):
            x[k] = x[k] / (UNIT + exp(x[k] * (GELU_1 + GELU_3 * x[k] * x[k])))


@compiled
def attend(kv, kv_size, keys, values, seen, head_size, work, q, scores, y):
    """One head of one row: a mean of `seen` values [seen, D], weighted by softmax of q . keys / sqrt(D)."""
    base = work.ctypes.data
    multiply(kv, keys, kv_size, head_size, seen, base + q * 4, head_size, 4, 1, base + scores * 4, 0)
    s = work[scores : scores + seen]
    top = s[0]
    for t in range(seen):
        top = max(top, s[t])
    factor = UNIT / np.sqrt(F(head_size))
    for t in range(seen):
        s[t] = exp((s[t] - top) * factor)
    total = F(0)
    for t in range(seen):
        total += s[t]
    weighted_sum(kv, values, base + scores * 4, seen, head_size, base + y * 4)
    out = work[y : y + head_size]
    for k in range(head_size):
        out[k] /= total


@compiled
def add_rows(work, y, x, stride, count, rows):
    """Add rows at place y to those at place x."""
    for row in range(rows):
        source = work[y + row * stride : y + row * stride + count]
        to = work[x + row * stride : x + row * stride + count]
        for k in range(count):
            to[k] += source[k]


@compiled
def embed(token, work, C, ids, positions, vectors, tables):
    """Token and position embeddings of each row, at the beginning of `work`."""
    for row in range(len(ids)):
        out = work[row * C : (row + 1) * C]
        factor = UNIT if tables[1] == NONE else vectors[tables[1] + ids[row]]
        for k in range(C):
            out[k] = read(token, tables[0], ids[row] * C + k) * factor + read(F(0), tables[2], positions[row] * C + k)


@compiled
def attend_all(kv, kv_size, cache, slots, positions, first, last, heads, head_size, context, work, places):
    """Heads `first` to `last` of all rows: their keys and values into the cache, then a mean of values for each."""
    C, block = heads * head_size, context * head_size * kv_size  # bytes of one head's keys
    qkv, scores, mixed = places
    for row in range(len(slots)):
        slot = cache + slots[row] * 2 * heads * block
        for part in range(1, 3):
            source = work[qkv + (row * 3 + part) * C : qkv + (row * 3 + part + 1) * C]
            for head in range(first, last):
                to = slot + ((part - 1) * heads + head) * block
                for k in range(head_size):
                    write(kv, to, positions[row] * head_size + k, source[head * head_size + k])
    for row in range(len(slots)):
        slot = cache + slots[row] * 2 * heads * block
        for head in range(first, last):
            keys, values = slot + head * block, slot + (heads + head) * block
            q, y = qkv + row * 3 * C + head * head_size, mixed + row * C + head * head_size
            attend(kv, kv_size, keys, values, positions[row] + 1, head_size, work, q, scores, y)


@compiled
def forward(
    token,
    kv,
    shape,
    table,
    vectors,
    tables,
    caches,
    ids,
    slots,
    positions,
    logits,
    work,
    numbers,
    scales,
    thread,
    threads,
    team,
):
    """`threads` calls at once, with numbers 0 to threads - 1, read one token in each row and write the last rows' logits.

    token, kv: numbers of the types that stand for the formats of the weights and of the cache (see `vectors`).
    shape: (layers, heads, D, context, N, bytes a weight, bytes a cached number). table [layers + 1, FIELDS], the last
    row for the final LayerNorm and the head. tables: addresses of the embedding, of its scales (int8) in `vectors`, of
    the positions. work, numbers, scales: room for all that is computed, see `CompiledStep`. logits [M, N]: of the last
    M rows.
    """
    layers, heads, head_size, context, tokens, size, kv_size = shape
    C, R, M = heads * head_size, len(ids), len(logits)
    x, qkv, mixed, inner = 0, R * C, 4 * R * C, 5 * R * C  # places in `work`
    ones = inner + 4 * R * C
    h = ones + C + thread * (R * C + context)
    state = (token, size, vectors, work, numbers, scales)
    work[ones : ones + C] = UNIT
    embed(token, work, C, ids, positions, vectors, tables)
    first, last = share(heads, thread, threads, 1)
    lo, hi = share(C, thread, threads, OUTPUTS)
    lo_inner, hi_inner = share(4 * C, thread, threads, OUTPUTS)
    meet(team, threads)
    for layer in range(layers):
        t = table[layer]
        # 1. Queries, keys and values of the thread's heads; attention; then all heads' results are there.
        normalise(work, x, h, C, R, vectors, t[LN_1], t[LN_1_BIAS], ones)
        prepare(size, work, h, C, R, numbers, scales)
        for part in range(3):
            lowest, highest = part * C + first * head_size, part * C + last * head_size
            linear(state, t, ATTN, 3 * C, lowest, highest, h, C, R, qkv + lowest, 3 * C)
        places = (qkv, h + R * C, mixed)
        attend_all(kv, kv_size, caches[layer], slots, positions, first, last, heads, head_size, context, work, places)
        meet(team, threads)
        # 2. The projection, added to the stream.
        prepare(size, work, mixed, C, R, numbers, scales)
        linear(state, t, PROJ, C, lo, hi, mixed, C, R, h, C)
        add_rows(work, h, x + lo, C, hi - lo, R)
        meet(team, threads)
        # 3. The MLP.
        normalise(work, x, h, C, R, vectors, t[LN_2], t[LN_2_BIAS], ones)
        prepare(size, work, h, C, R, numbers, scales)
        linear(state, t, FC, 4 * C, lo_inner, hi_inner, h, C, R, inner + lo_inner, 4 * C)
        gelu(work, inner + lo_inner, 4 * C, hi_inner - lo_inner, R)
        meet(team, threads)
        prepare(size, work, inner, 4 * C, R, numbers, scales)
        linear(state, t, MLP, C, lo, hi, inner, 4 * C, R, h, C)
        add_rows(work, h, x + lo, C, hi - lo, R)
        meet(team, threads)
    # 4. The head, for the last rows.
    t = table[layers]
    normalise(work, x + (R - M) * C, h, C, M, vectors, t[LN_1], t[LN_1_BIAS], ones)
    prepare(size, work, h, C, M, numbers, scales)
    flat = logits.reshape(-1)
    lo, hi = share(tokens, thread, threads, OUTPUTS)
    source, x_size = (numbers.ctypes.data, ROUNDED_SIZE) if size == 1 else (work.ctypes.data + h * 4, 4)
    multiply(token, t[ATTN] + lo * C * size, size, C, hi - lo, source, C, x_size, M, flat.ctypes.data + lo * 4, tokens)
    finish(size, flat, lo, tokens, M, lo, hi - lo, vectors, NONE, t[ATTN + SCALE], tokens, scales)
    meet(team, threads)
