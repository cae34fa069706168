"""In Triton: the dense keys or values of a few tiles of a run, channels by tokens. Imported only where Triton is.

Everywhere `run` points at the run's record, `head` is one of its heads, `start` a token of it, a multiple of 32 if the
run has codes, and a block is [D, 32 TILES]: D channels, a power of two and at least DIM, by 32 TILES tokens.
"""

# Triton's language looks like Python but is not: its functions have no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.kernels.kv_attention.triton_tables import RUN_FIELDS

_TOKENS = tl.constexpr(RUN_FIELDS.index("tokens"))
_TILES = tl.constexpr(RUN_FIELDS.index("tiles"))
_EXACT = tl.constexpr(RUN_FIELDS.index("exact"))
_HEAD_STRIDE = tl.constexpr(RUN_FIELDS.index("head_stride"))
_TOKEN_STRIDE = tl.constexpr(RUN_FIELDS.index("token_stride"))
_CODES = tl.constexpr(RUN_FIELDS.index("codes"))
_HIGH_CODES = tl.constexpr(RUN_FIELDS.index("high_codes"))
_CODEBOOK = tl.constexpr(RUN_FIELDS.index("codebook"))
_LEVELS = tl.constexpr(RUN_FIELDS.index("levels"))
_SCALE = tl.constexpr(RUN_FIELDS.index("scale"))
_MINIMUM = tl.constexpr(RUN_FIELDS.index("minimum"))
_GROUP_TOKENS = tl.constexpr(RUN_FIELDS.index("group_tokens"))
_GROUPS = tl.constexpr(RUN_FIELDS.index("groups"))
_RANK = tl.constexpr(RUN_FIELDS.index("rank"))
_TOKEN_FACTORS = tl.constexpr(RUN_FIELDS.index("token_factors"))
_CHANNEL_FACTORS = tl.constexpr(RUN_FIELDS.index("channel_factors"))
_OUTLIER_STARTS = tl.constexpr(RUN_FIELDS.index("outlier_starts"))
_OUTLIER_PLACES = tl.constexpr(RUN_FIELDS.index("outlier_places"))
_OUTLIER_VALUES = tl.constexpr(RUN_FIELDS.index("outlier_values"))
_FIRST_POSITION = tl.constexpr(RUN_FIELDS.index("first_position"))
_OVERRIDES = tl.constexpr(RUN_FIELDS.index("overrides"))
_OVERRIDE_TOKENS = tl.constexpr(RUN_FIELDS.index("override_tokens"))
_OVERRIDE_VALUES = tl.constexpr(RUN_FIELDS.index("override_values"))

_OUTLIERS_AT_ONCE = tl.constexpr(32)
_OVERRIDES_AT_ONCE = tl.constexpr(16)


@triton.jit
def _numbers_at(field, DTYPE: tl.constexpr):
    """The address in a field of a record, as a pointer to floats."""
    if DTYPE == "float16":
        pointer = tl.load(field).to(tl.pointer_type(tl.float16))
    elif DTYPE == "bfloat16":
        pointer = tl.load(field).to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = tl.load(field).to(tl.pointer_type(tl.float32))
    return pointer


@triton.jit
def decode_block(
    run, head, start, cos, sin, half, DIM: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, FORMAT: tl.constexpr
):
    """float32 [D, 32 TILES]: what `reference.decode` gives, zero beyond DIM; any finite numbers beyond the run."""
    channels = tl.arange(0, D)
    steps = tl.arange(0, 32 * TILES)
    block = _stored(run, head, start, channels, DIM, D, TILES, FORMAT)
    if FORMAT.rope:
        position = tl.load(run + _FIRST_POSITION)
        if position >= 0:
            # The other channel of each pair is decoded once more: a pair need not lie in one power of two.
            other = tl.where(channels < half, channels + half, tl.where(channels < 2 * half, channels - half, channels))
            partner = _stored(run, head, start, other, DIM, D, TILES, FORMAT)
            live = start + steps < tl.load(run + _TOKENS)
            angle = (position + start + steps)[None, :] * half + (channels % half)[:, None]
            rotated = (channels < 2 * half)[:, None] & live[None, :]
            sine = tl.load(sin + angle, mask=rotated, other=0.0)
            sine = tl.where((channels < half)[:, None], -sine, sine)
            block = block * tl.load(cos + angle, mask=rotated, other=1.0) + partner * sine
    if FORMAT.overrides:
        block = _overridden(block, run, head, start, channels, steps, DIM, TILES, FORMAT)
    return block


@triton.jit
def _stored(run, head, start, channels, DIM: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, FORMAT: tl.constexpr):
    """As stored: before rope and overrides."""
    if FORMAT.main.bits == 0:
        block = _exact(run, head, start, channels, DIM, TILES, FORMAT)
    elif FORMAT.exact:
        if tl.load(run + _CODES) == 0:
            block = _exact(run, head, start, channels, DIM, TILES, FORMAT)
        else:
            block = _coded(run, head, start, channels, DIM, D, TILES, FORMAT)
    else:
        block = _coded(run, head, start, channels, DIM, D, TILES, FORMAT)
    return block


@triton.jit
def _exact(run, head, start, channels, DIM: tl.constexpr, TILES: tl.constexpr, FORMAT: tl.constexpr):
    steps = tl.arange(0, 32 * TILES)
    live = start + steps < tl.load(run + _TOKENS)
    stride = tl.multiple_of(tl.load(run + _TOKEN_STRIDE), 8)
    base = _numbers_at(run + _EXACT, FORMAT.numbers)
    base = tl.multiple_of(base + head * tl.load(run + _HEAD_STRIDE) + start * stride, 16)
    at = steps[None, :] * stride + channels[:, None]
    return tl.load(base + at, mask=(channels < DIM)[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def _coded(run, head, start, channels, DIM: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, FORMAT: tl.constexpr):
    """Main, low rank, outliers."""
    MAIN: tl.constexpr = FORMAT.main
    steps = tl.arange(0, 32 * TILES)
    live = start + steps < tl.load(run + _TOKENS)
    inside = (channels < DIM)[:, None] & live[None, :]
    if MAIN.coupled > 1:
        GROUPS: tl.constexpr = DIM // MAIN.coupled
        group = channels // MAIN.coupled
        LOW: tl.constexpr = 8 if MAIN.bits > 8 else MAIN.bits
        codes = _codes(run, _CODES, head, start, group, GROUPS, D, TILES, LOW)
        if MAIN.bits > 8:
            codes |= _codes(run, _HIGH_CODES, head, start, group, GROUPS, D, TILES, MAIN.bits - 8) << 8
        entry = ((head * GROUPS + group)[:, None] * (1 << MAIN.bits) + codes) * MAIN.coupled
        book = _numbers_at(run + _CODEBOOK, "float16")
        block = tl.load(book + entry + (channels % MAIN.coupled)[:, None], mask=inside, other=0.0).to(tl.float32)
    else:
        codes = _codes(run, _CODES, head, start, channels, DIM, D, TILES, MAIN.bits)
        block = tl.load(_numbers_at(run + _LEVELS, "float32") + codes) if MAIN.levels else codes.to(tl.float32)
        if MAIN.scale:
            block *= _parameters(run, _SCALE, head, start, channels, inside, DIM, D, TILES, MAIN)
        if MAIN.minimum:
            block += _parameters(run, _MINIMUM, head, start, channels, inside, DIM, D, TILES, MAIN)
    if FORMAT.low_rank:
        rank = tl.load(run + _RANK)
        of_token = _numbers_at(run + _TOKEN_FACTORS, "float16") + head * rank * tl.load(run + _TILES) * 32 + start
        of_channel = _numbers_at(run + _CHANNEL_FACTORS, "float16") + head * rank * DIM
        for _ in range(rank):
            a = tl.load(of_token + steps, mask=live, other=0.0).to(tl.float32)
            b = tl.load(of_channel + channels, mask=channels < DIM, other=0.0).to(tl.float32)
            block += b[:, None] * a[None, :]
            of_token += tl.load(run + _TILES) * 32
            of_channel += DIM
    if FORMAT.outliers != "":  # noqa: SIM102
        # The condition above is decided when compiling, this one when running.
        if tl.load(run + _OUTLIER_STARTS) != 0:
            block = _with_outliers(block, run, head, start, channels, steps, TILES, FORMAT)
    return block


@triton.jit
def _codes(
    run,
    FIELD: tl.constexpr,
    head,
    start,
    rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
):
    """int32 [D, 32 TILES]: the codes of `rows`, of which a tile has ROWS."""
    tile = start // 32
    left = tl.load(run + _TILES) - tile
    base = tl.load(run + FIELD).to(tl.pointer_type(tl.int32))
    base += (head * tl.load(run + _TILES) + tile) * (ROWS * BITS)
    if ROWS * BITS % 4 == 0:
        base = tl.multiple_of(base, 16)
    if BITS == 3:
        codes = _words(base, left, rows, ROWS, D, TILES, 2, 3, 0) | (
            _words(base, left, rows, ROWS, D, TILES, 1, 3, 2) << 2
        )
    else:
        codes = _words(base, left, rows, ROWS, D, TILES, BITS, BITS, 0)
    return codes


@triton.jit
def _words(
    base,
    left,
    rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Codes of BITS bits in words FIRST ... of rows of ROW_WORDS words. Word w holds codes w, w + BITS, and so on."""
    tile = tl.arange(0, TILES)
    word = tl.arange(0, BITS)
    slot = tl.arange(0, 32 // BITS)
    at = tile[None, :, None] * (ROWS * ROW_WORDS) + rows[:, None, None] * ROW_WORDS + FIRST + word[None, None, :]
    there = (rows < ROWS)[:, None, None] & (tile < left)[None, :, None]
    words = tl.load(base + at, mask=there, other=0)
    codes = (words[:, :, None, :] >> (slot * BITS)[None, None, :, None]) & ((1 << BITS) - 1)
    return codes.reshape(D, 32 * TILES)


@triton.jit
def _parameters(
    run,
    FIELD: tl.constexpr,
    head,
    start,
    channels,
    inside,
    DIM: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    MAIN: tl.constexpr,
):
    """Scales or minima of groups as float32 [D, 32 TILES]; one load serves 16 tokens, or the channels of a group."""
    base = _numbers_at(run + FIELD, "float16")
    if MAIN.grouping == "tokens":
        first = start + 16 * tl.arange(0, 2 * TILES)
        group = (first // tl.load(run + _GROUP_TOKENS)).to(tl.int32)
        live = first < tl.load(run + _TOKENS)
        base = tl.multiple_of(base + head * tl.load(run + _GROUPS) * DIM, 16)
        at = group[None, :] * DIM + channels[:, None]
        few = tl.load(base + at, mask=(channels < DIM)[:, None] & live[None, :], other=0.0).to(tl.float32)
        spread = tl.broadcast_to(few[:, :, None], [D, 2 * TILES, 16]).reshape(D, 32 * TILES)
    else:
        SIZE: tl.constexpr = MAIN.group_channels
        columns = tl.load(run + _TILES) * 32
        base = tl.multiple_of(base + start, 16)
        steps = tl.arange(0, 32 * TILES)
        if MAIN.grouping == "channels of a head":
            of_head = tl.arange(0, D // SIZE)
            live = start + steps < tl.load(run + _TOKENS)
            at = (head * (DIM // SIZE) + of_head)[:, None] * columns + steps[None, :]
            few = tl.load(base + at, mask=(of_head < DIM // SIZE)[:, None] & live[None, :], other=0.0).to(tl.float32)
            spread = tl.broadcast_to(few[:, None, :], [D // SIZE, SIZE, 32 * TILES]).reshape(D, 32 * TILES)
        else:
            at = ((head * DIM + channels) // SIZE)[:, None] * columns + steps[None, :]
            spread = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    return spread


@triton.jit
def _with_outliers(block, run, head, start, channels, steps, TILES: tl.constexpr, FORMAT: tl.constexpr):
    """Outliers come as a list, a block wants them in place: a product of two matrices with a single one per outlier.

    float16 and bfloat16 are exact in tf32, and each sum has one term, so the product is exact.
    """
    tile_count = tl.load(run + _TILES)
    tile = start // 32
    starts = tl.load(run + _OUTLIER_STARTS).to(tl.pointer_type(tl.int32)) + head * tile_count
    places = tl.load(run + _OUTLIER_PLACES).to(tl.pointer_type(tl.int16))
    values = _numbers_at(run + _OUTLIER_VALUES, FORMAT.outliers)
    end = tl.load(starts + tl.minimum(tile + TILES, tile_count))
    for first in range(tl.load(starts + tile), end, _OUTLIERS_AT_ONCE):
        index = first + tl.arange(0, _OUTLIERS_AT_ONCE)
        live = index < end
        place = tl.load(places + index, mask=live, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(values + index, mask=live, other=0.0).to(tl.float32)
        token = place % 32
        for later in tl.static_range(1, TILES):
            token += tl.where(index >= tl.load(starts + tl.minimum(tile + later, tile_count)), 32, 0)
        of_channel = (channels[:, None] == (place // 32)[None, :]) & live[None, :]
        of_token = (token[:, None] == steps[None, :]).to(tl.float32)
        replacing = tl.dot(tl.where(of_channel, value[None, :], 0.0), of_token, input_precision="tf32")
        found = tl.dot(of_channel.to(tl.float32), of_token, input_precision="tf32")
        block = tl.where(found > 0.5, replacing, block)
    return block


@triton.jit
def _overridden(block, run, head, start, channels, steps, DIM: tl.constexpr, TILES: tl.constexpr, FORMAT: tl.constexpr):
    count = tl.load(run + _OVERRIDES)
    tokens = tl.load(run + _OVERRIDE_TOKENS).to(tl.pointer_type(tl.int32))
    which = tl.full([32 * TILES], -1, tl.int32)  # override of each token
    for first in range(0, count, _OVERRIDES_AT_ONCE):
        index = (first + tl.arange(0, _OVERRIDES_AT_ONCE)).to(tl.int32)
        token = tl.load(tokens + index, mask=index < count, other=-1)
        same = token[:, None] == (start + steps)[None, :]
        which = tl.maximum(which, tl.max(tl.where(same, index[:, None], -1), axis=0))
    values = _numbers_at(run + _OVERRIDE_VALUES, FORMAT.numbers) + head * count * DIM
    at = which[None, :] * DIM + channels[:, None]
    replaced = (which >= 0)[None, :] & (channels < DIM)[:, None]
    return tl.where((which >= 0)[None, :], tl.load(values + at, mask=replaced, other=0.0).to(tl.float32), block)
