"""Triton kernels of group_norm_silu.py, which has the formulas and names.

A tile is [pixels, channels] whatever the layout: channels_last puts 16-byte accesses along channels, contiguous
along pixels. Two ways through:

- resident: a program holds whole groups of a sample in registers. One launch forward, two backward.
- chunked: a program reduces a chunk of pixels to two or three numbers a channel, a second launch merges the
  chunks of each group in fixed order, a third applies the result. Chunks depend on the sample's shape alone.

Variances are of deviations from a mean: Welford's update from tile to tile, then Chan's merge of lanes, chunks
and channels. No sum of squares is ever subtracted from another, and nothing is atomic.
"""

from __future__ import annotations

from rdmd_fast.kernels._dispatch import jit, tl

# Sizes come as counts of constexpr units, so that alignment is known without a variant for each value.
SIZES = ["channel_units", "pixel_units", "channels", "pixels", "chunks", "group_channels", "samples"]
SIZES += ["scale_stride", "shift_stride", "addend_stride"]


@jit
def _offsets(pixel, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        offsets = pixel[:, None] * channels + channel[None, :]
    else:
        offsets = channel[None, :] * pixels + pixel[:, None]
    return offsets


@jit
def _modulation(values, stride, sample, channel, inside):
    """One row of an optional [N, C] tensor."""
    if values is None:
        row = tl.zeros(channel.shape, tl.float32)
    else:
        row = tl.load(values + sample * stride + channel, mask=inside, other=0).to(tl.float32)
    return row


@jit
def _addend(addend, stride, x_bias, sample, channel, inside):
    """What is added to a sample's x: a row of [N, C] and a bias [C], both optional."""
    row = _modulation(addend, stride, sample, channel, inside)
    if x_bias is not None:
        row += tl.load(x_bias + channel, mask=inside, other=0).to(tl.float32)
    return row


@jit
def _group_sum(values, TILE_C: tl.constexpr, GROUP: tl.constexpr):
    """Sums over each GROUP neighbours of [TILE_C], in every member's place."""
    grouped = tl.reshape(values, [TILE_C // GROUP, GROUP])
    sums = tl.broadcast_to(tl.sum(grouped, 1)[:, None], [TILE_C // GROUP, GROUP])
    return tl.reshape(sums, [TILE_C])


@jit
def _activate(z, SILU: tl.constexpr):
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@jit
def _preactivation_gradient(dy, z, SILU: tl.constexpr):
    if SILU:
        gate = tl.sigmoid(z)
        dy = dy * gate * (1 + z * (1 - gate))
    return dy


@jit
def _store_table(table, row, size, channel, inside, center, rstd, weight, bias, scale, shift):
    """One sample's part of each row of [4, N, C], at ``row``; rows lie ``size`` apart. Returns (gain, offset)."""
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    gain, offset = rstd * w * (1 + scale), b * (1 + scale) + shift
    table += row + channel
    tl.store(table, center, mask=inside)
    tl.store(table + size, rstd, mask=inside)
    tl.store(table + 2 * size, gain, mask=inside)
    tl.store(table + 3 * size, offset, mask=inside)
    return gain, offset


@jit
def _load_table(table, row, size, channel, inside):
    """(mean - addend, gain, offset) of one sample's channels, as rows [1, C] of a tile."""
    table += row + channel
    center = tl.load(table, mask=inside, other=0)[None, :]
    gain = tl.load(table + 2 * size, mask=inside, other=0)[None, :]
    offset = tl.load(table + 3 * size, mask=inside, other=0)[None, :]
    return center, gain, offset


@jit
def _store_gradients(
    p1, p2, p3, table, weight, bias, scale, contributions, modulation, row, size, channels, channel, inside, pixels,
    group_elements, TILE_C: tl.constexpr, GROUP: tl.constexpr, X_BIAS: tl.constexpr,
):  # fmt: skip
    """From sums of dz, dz c and c: the per-sample gradients, and (rstd² m2, rstd m1) of dx."""
    rstd = tl.load(table + size + row + channel, mask=inside, other=0)
    gain = tl.load(table + 2 * size + row + channel, mask=inside, other=0)
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    p2 *= rstd
    slope = rstd * rstd * _group_sum(w * (1 + scale) * p2, TILE_C, GROUP) / group_elements
    constant = rstd * _group_sum(w * (1 + scale) * p1, TILE_C, GROUP) / group_elements
    contributions += row * (2 + X_BIAS) + channel
    tl.store(contributions, (1 + scale) * p2, mask=inside)
    tl.store(contributions + channels, (1 + scale) * p1, mask=inside)
    by_addend = gain * p1 - slope * p3 - pixels * constant
    if X_BIAS:
        tl.store(contributions + 2 * channels, by_addend, mask=inside)
    modulation += row + channel
    tl.store(modulation, w * p2 + b * p1, mask=inside)
    tl.store(modulation + size, p1, mask=inside)
    tl.store(modulation + 2 * size, by_addend, mask=inside)
    return slope, constant


@jit(do_not_specialize=SIZES)
def resident_forward_kernel(
    x, y, weight, bias, x_bias, scale, shift, addend, table, samples, channel_units, pixel_units, scale_stride,
    shift_stride, addend_stride, eps, CHANNELS_LAST: tl.constexpr, CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    channels, pixels = channel_units * CHANNEL_UNIT, pixel_units * PIXEL_UNIT
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < channels
    pixel = tl.arange(0, TILE_P)
    mask = (pixel < pixels)[:, None] & inside[None, :]
    offsets = sample * channels * pixels + _offsets(pixel, channel, pixels, channels, CHANNELS_LAST)
    shifted = _addend(addend, addend_stride, x_bias, sample, channel, inside)
    value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
    elements = pixels * GROUP
    mean = _group_sum(tl.sum(value, 0) + pixels * shifted, TILE_C, GROUP) / elements
    center = mean - shifted
    centered = tl.where(mask, value - center[None, :], 0.0)
    variance = _group_sum(tl.sum(centered * centered, 0), TILE_C, GROUP) / elements
    gain, offset = _store_table(
        table, sample * channels, samples.to(tl.int64) * channels, channel, inside, center, tl.rsqrt(variance + eps),
        weight, bias, _modulation(scale, scale_stride, sample, channel, inside),
        _modulation(shift, shift_stride, sample, channel, inside),
    )  # fmt: skip
    result = _activate(centered * gain[None, :] + offset[None, :], SILU)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=SIZES)
def resident_backward_kernel(
    x, dy, branch, dx, weight, bias, scale, table, contributions, modulation, samples, channel_units, pixel_units,
    scale_stride, CHANNELS_LAST: tl.constexpr, CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr, X_BIAS: tl.constexpr,
):  # fmt: skip
    channels, pixels = channel_units * CHANNEL_UNIT, pixel_units * PIXEL_UNIT
    sample = tl.program_id(0).to(tl.int64)
    row, size = sample * channels, samples.to(tl.int64) * channels
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < channels
    pixel = tl.arange(0, TILE_P)
    mask = (pixel < pixels)[:, None] & inside[None, :]
    offsets = row * pixels + _offsets(pixel, channel, pixels, channels, CHANNELS_LAST)
    center, gain, offset = _load_table(table, row, size, channel, inside)
    centered = tl.load(x + offsets, mask=mask, other=0).to(tl.float32) - center
    centered = tl.where(mask, centered, 0.0)
    dz = tl.load(dy + offsets, mask=mask, other=0).to(tl.float32)
    dz = _preactivation_gradient(dz, centered * gain + offset, SILU)
    slope, constant = _store_gradients(
        tl.sum(dz, 0), tl.sum(dz * centered, 0), tl.sum(centered, 0), table, weight, bias,
        _modulation(scale, scale_stride, sample, channel, inside), contributions, modulation, row, size,
        channels, channel, inside, pixels, pixels * GROUP, TILE_C, GROUP, X_BIAS,
    )  # fmt: skip
    result = dz * gain - centered * slope[None, :] - constant[None, :]
    if branch is not None:
        result += tl.load(branch + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


@jit(do_not_specialize=SIZES)
def moments_kernel(
    x, partials, channel_units, pixel_units, chunks, CHANNELS_LAST: tl.constexpr, CHANNEL_UNIT: tl.constexpr,
    PIXEL_UNIT: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel in a chunk: partials [N chunks, 2, C]."""
    channels, pixels = channel_units * CHANNEL_UNIT, pixel_units * PIXEL_UNIT
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    lane = (program % chunks).to(tl.int32) * (TILE_P * STEPS) + tl.arange(0, TILE_P)
    x += sample * channels * pixels
    mean = tl.zeros([TILE_P, TILE_C], tl.float32)
    square = tl.zeros([TILE_P, TILE_C], tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=2):
        pixel = lane + step * TILE_P
        mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        value = tl.load(x + _offsets(pixel, channel, pixels, channels, CHANNELS_LAST), mask=mask, other=0)
        value = value.to(tl.float32)
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        square += delta * (value - mean)
    count = tl.minimum(tl.maximum((pixels - lane + TILE_P - 1) // TILE_P, 0), STEPS).to(tl.float32)
    center = tl.sum(mean * count[:, None], 0) / tl.sum(count, 0)
    deviation = mean - center[None, :]
    square = tl.sum(square + deviation * deviation * count[:, None], 0)
    partials += program * 2 * channels + channel
    tl.store(partials, center, mask=channel < channels)
    tl.store(partials + channels, square, mask=channel < channels)


@jit(do_not_specialize=SIZES)
def table_kernel(
    partials, weight, bias, x_bias, scale, shift, addend, table, samples, channels, pixels, chunks, group_channels,
    scale_stride, shift_stride, addend_stride, eps, CHUNK: tl.constexpr, TILE_CHUNKS: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    """Merge the chunks and channels of one group of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE_C)
    inside, channel = lane < group_channels, tl.program_id(1) * group_channels + lane
    shifted = _addend(addend, addend_stride, x_bias, sample, channel, inside)
    partials += sample * chunks * 2 * channels + channel[None, :]
    total = tl.zeros([TILE_C], tl.float32)
    for start in range(0, chunks, TILE_CHUNKS):
        chunk = start + tl.arange(0, TILE_CHUNKS)
        count = tl.minimum(tl.maximum(pixels - chunk * CHUNK, 0), CHUNK).to(tl.float32)[:, None]
        mask = (chunk < chunks)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partials + chunk[:, None] * 2 * channels, mask=mask, other=0) * count, 0)
    elements = pixels * group_channels
    mean = tl.sum(tl.where(inside, total + pixels * shifted, 0.0), 0) / elements
    center = mean - shifted
    square = tl.zeros([TILE_C], tl.float32)
    for start in range(0, chunks, TILE_CHUNKS):
        chunk = start + tl.arange(0, TILE_CHUNKS)
        count = tl.minimum(tl.maximum(pixels - chunk * CHUNK, 0), CHUNK).to(tl.float32)[:, None]
        mask = (chunk < chunks)[:, None] & inside[None, :]
        deviation = tl.load(partials + chunk[:, None] * 2 * channels, mask=mask, other=0) - center[None, :]
        within = tl.load(partials + (chunk[:, None] * 2 + 1) * channels, mask=mask, other=0)
        square += tl.sum(tl.where(mask, within + deviation * deviation * count, 0.0), 0)
    rstd = tl.rsqrt(tl.sum(square, 0) / elements + eps)
    _store_table(
        table, sample * channels, samples.to(tl.int64) * channels, channel, inside, center,
        tl.zeros([TILE_C], tl.float32) + rstd, weight, bias, _modulation(scale, scale_stride, sample, channel, inside),
        _modulation(shift, shift_stride, sample, channel, inside),
    )  # fmt: skip


@jit(do_not_specialize=SIZES)
def apply_kernel(
    x, y, table, samples, channel_units, pixel_units, chunks, CHANNELS_LAST: tl.constexpr, CHANNEL_UNIT: tl.constexpr,
    PIXEL_UNIT: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    channels, pixels = channel_units * CHANNEL_UNIT, pixel_units * PIXEL_UNIT
    program = tl.program_id(0).to(tl.int64)
    row, size = program // chunks * channels, samples.to(tl.int64) * channels
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < channels
    lane = (program % chunks).to(tl.int32) * (TILE_P * STEPS) + tl.arange(0, TILE_P)
    center, gain, offset = _load_table(table, row, size, channel, inside)
    x += row * pixels
    y += row * pixels
    for step in tl.range(0, STEPS, loop_unroll_factor=4):
        pixel = lane + step * TILE_P
        mask = (pixel < pixels)[:, None] & inside[None, :]
        offsets = _offsets(pixel, channel, pixels, channels, CHANNELS_LAST)
        value = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        result = _activate((value - center) * gain + offset, SILU)
        tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=SIZES)
def gradient_sums_kernel(
    x, dy, table, partials, samples, channel_units, pixel_units, chunks, CHANNELS_LAST: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
    STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz c and c of each channel in a chunk: partials [N chunks, 3, C]."""
    channels, pixels = channel_units * CHANNEL_UNIT, pixel_units * PIXEL_UNIT
    program = tl.program_id(0).to(tl.int64)
    row, size = program // chunks * channels, samples.to(tl.int64) * channels
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < channels
    lane = (program % chunks).to(tl.int32) * (TILE_P * STEPS) + tl.arange(0, TILE_P)
    center, gain, offset = _load_table(table, row, size, channel, inside)
    x += row * pixels
    dy += row * pixels
    p1 = tl.zeros([TILE_P, TILE_C], tl.float32)
    p2 = tl.zeros([TILE_P, TILE_C], tl.float32)
    p3 = tl.zeros([TILE_P, TILE_C], tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=2):
        pixel = lane + step * TILE_P
        mask = (pixel < pixels)[:, None] & inside[None, :]
        offsets = _offsets(pixel, channel, pixels, channels, CHANNELS_LAST)
        centered = tl.where(mask, tl.load(x + offsets, mask=mask, other=0).to(tl.float32) - center, 0.0)
        dz = tl.load(dy + offsets, mask=mask, other=0).to(tl.float32)
        dz = _preactivation_gradient(dz, centered * gain + offset, SILU)
        p1 += dz
        p2 += dz * centered
        p3 += centered
    partials += program * 3 * channels + channel
    tl.store(partials, tl.sum(p1, 0), mask=inside)
    tl.store(partials + channels, tl.sum(p2, 0), mask=inside)
    tl.store(partials + 2 * channels, tl.sum(p3, 0), mask=inside)


@jit(do_not_specialize=SIZES)
def gradient_table_kernel(
    partials, table, weight, bias, scale, contributions, modulation, slopes, samples, channels, pixels, chunks,
    group_channels, scale_stride, TILE_CHUNKS: tl.constexpr, TILE_C: tl.constexpr, X_BIAS: tl.constexpr,
):  # fmt: skip
    """Merge the chunks and channels of one group of one sample; slopes [2, N, C] are (rstd² m2, rstd m1)."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE_C)
    inside, channel = lane < group_channels, tl.program_id(1) * group_channels + lane
    partials += sample * chunks * 3 * channels + channel[None, :]
    p1 = tl.zeros([TILE_C], tl.float32)
    p2 = tl.zeros([TILE_C], tl.float32)
    p3 = tl.zeros([TILE_C], tl.float32)
    for start in range(0, chunks, TILE_CHUNKS):
        chunk = start + tl.arange(0, TILE_CHUNKS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        first = partials + chunk[:, None] * 3 * channels
        p1 += tl.sum(tl.load(first, mask=mask, other=0), 0)
        p2 += tl.sum(tl.load(first + channels, mask=mask, other=0), 0)
        p3 += tl.sum(tl.load(first + 2 * channels, mask=mask, other=0), 0)
    row, size = sample * channels, samples.to(tl.int64) * channels
    slope, constant = _store_gradients(
        p1, p2, p3, table, weight, bias, _modulation(scale, scale_stride, sample, channel, inside), contributions,
        modulation, row, size, channels, channel, inside, pixels, pixels * group_channels, TILE_C, TILE_C, X_BIAS,
    )  # fmt: skip
    tl.store(slopes + row + channel, slope, mask=inside)
    tl.store(slopes + size + row + channel, constant, mask=inside)


@jit(do_not_specialize=SIZES)
def gradient_apply_kernel(
    x, dy, branch, dx, table, slopes, samples, channel_units, pixel_units, chunks, CHANNELS_LAST: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
    STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    channels, pixels = channel_units * CHANNEL_UNIT, pixel_units * PIXEL_UNIT
    program = tl.program_id(0).to(tl.int64)
    row, size = program // chunks * channels, samples.to(tl.int64) * channels
    channel = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channel < channels
    lane = (program % chunks).to(tl.int32) * (TILE_P * STEPS) + tl.arange(0, TILE_P)
    center, gain, offset = _load_table(table, row, size, channel, inside)
    slope = tl.load(slopes + row + channel, mask=inside, other=0)[None, :]
    constant = tl.load(slopes + size + row + channel, mask=inside, other=0)[None, :]
    x += row * pixels
    dy += row * pixels
    dx += row * pixels
    for step in tl.range(0, STEPS, loop_unroll_factor=2):
        pixel = lane + step * TILE_P
        mask = (pixel < pixels)[:, None] & inside[None, :]
        offsets = _offsets(pixel, channel, pixels, channels, CHANNELS_LAST)
        centered = tl.load(x + offsets, mask=mask, other=0).to(tl.float32) - center
        dz = tl.load(dy + offsets, mask=mask, other=0).to(tl.float32)
        dz = _preactivation_gradient(dz, centered * gain + offset, SILU)
        result = dz * gain - centered * slope - constant
        if branch is not None:
            result += tl.load(branch + row * pixels + offsets, mask=mask, other=0).to(tl.float32)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
