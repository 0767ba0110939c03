"""The kernel of `augment`: one gather."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["height", "width", "padding"])
def _crop_flip(x, offsets, flips, out, height, width, padding, BLOCK: tl.constexpr):
    # x uint8 and out float32: (B,height,width,3); offsets int64 (B,2); flips bool (B)
    image = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel, channel = at // 3, at % 3
    i, j = pixel // width, pixel % width
    row = i + (tl.load(offsets + 2 * image).to(tl.int32) - padding)
    mirrored = tl.load(flips + image).to(tl.int32) != 0
    column = tl.where(mirrored, width - 1 - j, j) + (tl.load(offsets + 2 * image + 1).to(tl.int32) - padding)
    start = image.to(tl.int64) * height * width * 3
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (i < height)
    value = tl.load(x + start + (row * width + column) * 3 + channel, mask=inside, other=0).to(tl.float32)
    tl.store(out + start + at, tl.div_rn(value, 255.0), mask=i < height)
