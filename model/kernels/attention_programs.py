"""The programs of attention: outputs and log-sum-exp, gradients of queries, gradients of keys and values.

A program of the first two holds a tile of queries of one head and goes through the keys that they may see; one of the
third holds a tile of keys of one KV head and goes through the queries of all its heads. What a query sees is its
interval of keys, asked for every pair; the tables of `model/tiles.py` only say where to begin and to stop. Nothing is
added up by two programs, so that the same comes out every time.

Arguments: addresses; strides of tokens and heads; and, fixed when a program is compiled, GROUP query heads of a KV
head, WIDTH of a head, COLUMNS the power of 2 that holds it, QUERIES and KEYS of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of(base, row, stride, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [R, COLUMNS] of a matrix; zeros outside."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(base + row[:, None] * stride + column, mask=inside[:, None] & (column < WIDTH), other=0.0)


@triton.jit
def put_rows(base, row, stride, inside, values, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write rows [R, COLUMNS] of a matrix."""
    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < WIDTH)
    tl.store(base + row[:, None] * stride + column, values.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])  # each batch has another
def forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    lse,
    tiles,
    first_key,
    last_key,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    num_tiles,
    num_heads,
    num_keys,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Outputs of a tile of queries, and the log-sum-exp of their scores."""
    head = tl.program_id(0) // num_tiles  # programs side by side read the same keys
    tile = tiles + (num_tiles - 1 - tl.program_id(0) % num_tiles) * 5  # the longest first
    sequence, start = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    key_start, key_end = tl.load(tile + 3), tl.load(tile + 4)
    row = tl.arange(0, QUERIES)  # of the tile, as all rows here: only where it begins may be a large number
    inside = row < tl.load(tile + 2) - start
    first = tl.load(first_key + start + row, mask=inside, other=num_keys)
    last = tl.load(last_key + start + row, mask=inside, other=-1)
    q_tile = rows_of(q + start * q_token + head * q_head, row, q_token, inside, WIDTH, COLUMNS)
    k_base = k + sequence * num_keys * k_token + (head // GROUP) * k_head
    v_base = v + sequence * num_keys * v_token + (head // GROUP) * v_head
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for at in tl.range(key_start, key_end, KEYS):
        key = at + tl.arange(0, KEYS)
        real = key < key_end
        k_tile = rows_of(k_base, key, k_token, real, WIDTH, COLUMNS)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        shares = tl.exp2((scores - shift[:, None]) * LOG2_E)  # large scores differ exactly, before anything is rounded
        shrink = tl.exp2((most - shift) * LOG2_E)
        v_tile = rows_of(v_base, key, v_token, real, WIDTH, COLUMNS)
        sums = sums * shrink[:, None]
        sums = tl.dot(shares.to(v_tile.dtype), v_tile, sums, input_precision="ieee")
        total = total * shrink + tl.sum(shares, 1)
        most = new_most
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    put_rows(out + start * out_token + head * out_head, row, out_token, inside, sums, WIDTH, COLUMNS)
    found = tl.where(empty, float("-inf"), most + tl.log2(tl.where(empty, 1.0, total)) * LN_2)
    tl.store(lse + (start + row) * num_heads + head, found, mask=inside)


@triton.jit(do_not_specialize=["num_tiles"])  # each batch has another
def backward_queries(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    grad,
    lse,
    dot,
    of_q,
    tiles,
    first_key,
    last_key,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    grad_token,
    grad_head,
    of_q_token,
    of_q_head,
    num_tiles,
    num_heads,
    num_keys,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of a tile of queries; `dot` is what softmax takes off each query's gradient of its scores."""
    head = tl.program_id(0) // num_tiles
    tile = tiles + (num_tiles - 1 - tl.program_id(0) % num_tiles) * 5
    sequence, start = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    key_start, key_end = tl.load(tile + 3), tl.load(tile + 4)
    row = tl.arange(0, QUERIES)  # of the tile, as all rows here: only where it begins may be a large number
    inside = row < tl.load(tile + 2) - start
    first = tl.load(first_key + start + row, mask=inside, other=num_keys)
    last = tl.load(last_key + start + row, mask=inside, other=-1)
    q_tile = rows_of(q + start * q_token + head * q_head, row, q_token, inside, WIDTH, COLUMNS)
    grad_tile = rows_of(grad + start * grad_token + head * grad_head, row, grad_token, inside, WIDTH, COLUMNS)
    log_sum = tl.load(lse + (start + row) * num_heads + head, mask=inside, other=0.0)
    off = tl.load(dot + (start + row) * num_heads + head, mask=inside, other=0.0)
    k_base = k + sequence * num_keys * k_token + (head // GROUP) * k_head
    v_base = v + sequence * num_keys * v_token + (head // GROUP) * v_head
    sums = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for at in tl.range(key_start, key_end, KEYS):
        key = at + tl.arange(0, KEYS)
        real = key < key_end
        k_tile = rows_of(k_base, key, k_token, real, WIDTH, COLUMNS)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        shares = tl.where(seen, tl.exp2((scores - log_sum[:, None]) * LOG2_E), 0.0)
        v_tile = rows_of(v_base, key, v_token, real, WIDTH, COLUMNS)
        of_shares = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        of_scores = shares * (of_shares - off[:, None])
        sums = tl.dot(of_scores.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
    put_rows(of_q + start * of_q_token + head * of_q_head, row, of_q_token, inside, sums, WIDTH, COLUMNS)


@triton.jit
def backward_keys(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    grad,
    lse,
    dot,
    of_k,
    of_v,
    spans,
    first_key,
    last_key,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    grad_token,
    grad_head,
    of_k_token,
    of_k_head,
    num_tiles,
    num_heads,
    num_keys,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of a tile of keys, of its values, or of both: of those whose address is given.

    spans: for every SPAN keys of every sequence the first query that may see one, and the end of those.
    """
    kv_head = tl.program_id(1)
    sequence, tile = (tl.program_id(0) // num_tiles).to(tl.int64), tl.program_id(0) % num_tiles
    span = spans + (sequence * tl.cdiv(num_keys, SPAN) + tile * KEYS // SPAN) * 2
    start = tl.load(span).to(tl.int64)
    count = (tl.load(span + 1) - start).to(tl.int32)
    key = tile * KEYS + tl.arange(0, KEYS)
    real = key < num_keys
    first_row = sequence * num_keys
    k_tile = rows_of(k + first_row * k_token + kv_head * k_head, key, k_token, real, WIDTH, COLUMNS)
    if of_k is not None:
        v_tile = rows_of(v + first_row * v_token + kv_head * v_head, key, v_token, real, WIDTH, COLUMNS)
        k_sums = tl.zeros((KEYS, COLUMNS), tl.float32)
    if of_v is not None:
        v_sums = tl.zeros((KEYS, COLUMNS), tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        for step in tl.range(0, count, QUERIES):
            at = start + step
            row = tl.arange(0, QUERIES)
            inside = row < count - step
            first = tl.load(first_key + at + row, mask=inside, other=num_keys)
            last = tl.load(last_key + at + row, mask=inside, other=-1)
            q_tile = rows_of(q + at * q_token + head * q_head, row, q_token, inside, WIDTH, COLUMNS)
            log_sum = tl.load(lse + at * num_heads + head + row * num_heads, mask=inside, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            seen = (key[:, None] >= first[None, :]) & (key[:, None] <= last[None, :])
            shares = tl.where(seen, tl.exp2((scores - log_sum[None, :]) * LOG2_E), 0.0)
            grad_tile = rows_of(grad + at * grad_token + head * grad_head, row, grad_token, inside, WIDTH, COLUMNS)
            if of_v is not None:
                v_sums = tl.dot(shares.to(grad_tile.dtype), grad_tile, v_sums, input_precision="ieee")
            if of_k is not None:
                off = tl.load(dot + at * num_heads + head + row * num_heads, mask=inside, other=0.0)
                of_shares = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
                of_scores = shares * (of_shares - off[None, :])
                k_sums = tl.dot(of_scores.to(q_tile.dtype), q_tile, k_sums, input_precision="ieee")
    if of_k is not None:
        put_rows(of_k + first_row * of_k_token + kv_head * of_k_head, key, of_k_token, real, k_sums, WIDTH, COLUMNS)
    if of_v is not None:
        put_rows(of_v + first_row * of_k_token + kv_head * of_k_head, key, of_k_token, real, v_sums, WIDTH, COLUMNS)
