"""Other forms of the attack's convolutions: the same results, other launches. `ARMS` is the table of them.

    plain     convolution, shift, residual, ReLU; the input's gradient by aten::convolution_backward
    fused     shift, residual and ReLU inside the convolution, by cuDNN
    turned    the input's gradient as forward convolutions with weights flipped beforehand: one at stride 1, at stride s
              one for each of the s x s places that a pixel can have, with the taps that meet it
    bits      where the ReLU let its input through kept as one bit of an int32, for 32 channels a word: the gradient
              reads 1/16 of the bytes of a bf16 output. PyTorch 2.11 makes two kernels of it, which move more than that
    padded    the stem's input and weight filled up with zeros to 8 channels

A form is a tuple of arms, () the plain one. Only the gradients of the images and of the residual exist. An arm says to
which convolution it applies; there it equals the plain form in float64 (tests/test_arms.py). Which form is taken where
is `fastafd.attacks.choice`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.attacks.conv_relu import conv_relu, out_size

CHANNELS, WORD = 8, 32  # of a padded stem; bits of a word
Form = tuple[str, ...]
Pair = tuple[int, int]


class Site(NamedTuple):
    """What is fixed of a convolution and of what follows it."""

    kernel: Pair
    stride: Pair
    padding: Pair
    relu: bool


# -- turned -------------------------------------------------------------------------------------------------------


def turned_weights(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> list[Tensor]:
    """The weights (C,D,k',l') of the convolutions that are the input's gradient: one for each place that has taps."""
    kernel = weight.shape[2:]
    found = []
    for row in range(stride[0]):
        for column in range(stride[1]):
            first = (row + padding[0]) % stride[0], (column + padding[1]) % stride[1]
            if first[0] < kernel[0] and first[1] < kernel[1]:
                taps = weight[:, :, first[0] :: stride[0], first[1] :: stride[1]]
                found.append(taps.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last))
    return found


def turned_gradient(
    g: Tensor,
    turned: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """The gradient (B,C,H,W) of a convolution's input of this size (H, W), from that of its output, g (B,D,h,w).

    Pixel s j + a of the input meets the taps a + padding - s (i - j) of the weight, i the output's pixel: for each of
    the s places a (in rows and columns) a convolution of g of stride 1, with every s-th tap, in reverse order.
    """
    weights = iter(turned)
    lengths = [-(-n // s) for n, s in zip(size, stride, strict=True)]
    places = []
    for row in range(stride[0]):
        beside = []
        for column in range(stride[1]):
            around, starts, empty = [], [], False
            for axis, place in enumerate((row, column)):
                first = (place + padding[axis]) % stride[axis]
                taps = len(range(first, kernel[axis], stride[axis]))
                before = taps - 1 - (place + padding[axis] - first) // stride[axis]
                after = lengths[axis] - g.shape[2 + axis] - before + taps - 1
                around.append(max(before, after, 0))
                starts.append(around[-1] - before)
                empty |= not taps
            if empty:
                part = g.new_zeros(g.shape[0], *lengths, turned[0].shape[0])
            else:
                out = F.conv2d(g, next(weights), padding=around)
                out = out[:, :, starts[0] : starts[0] + lengths[0], starts[1] : starts[1] + lengths[1]]
                part = out.permute(0, 2, 3, 1)
            beside.append(part)
        places.append(torch.stack(beside, 3) if len(beside) > 1 else beside[0].unsqueeze(3))
    if len(places) == 1 and stride[1] == 1:
        return places[0].squeeze(3).permute(0, 3, 1, 2)
    whole = torch.stack(places, 2).flatten(3, 4).flatten(1, 2)  # (B, rows, columns, C)
    return whole.permute(0, 3, 1, 2)[:, :, : size[0], : size[1]]


# -- bits ---------------------------------------------------------------------------------------------------------


def pack(on: Tensor) -> Tensor:
    """(B,C,H,W) of truth values -> (B,H,W,C/32) int32, of channel c bit c % 32 of word c // 32."""
    bits = on.permute(0, 2, 3, 1).unflatten(3, (-1, WORD)).to(torch.int32)
    places = torch.arange(WORD, dtype=torch.int32, device=on.device)
    return (bits << places).sum(-1, dtype=torch.int32)  # no two have a bit in common: the sum is their union


def unpack(words: Tensor) -> Tensor:
    """The reverse of `pack`."""
    places = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(-1) >> places) & 1
    return bits.flatten(3).permute(0, 3, 1, 2) != 0


# -- the table ----------------------------------------------------------------------------------------------------


def plain_sum(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, site: Site) -> Tensor:
    """The convolution, its shift and the residual: what a ReLU follows."""
    out = F.conv2d(x, weight, None, site.stride, site.padding)
    shifted = out + shift[:, None, None]
    # No `.to` that is the same tensor: PyTorch 2.11 loses the gradient of a Function whose output is another's alias.
    shifted = shifted if shifted.dtype == out.dtype else shifted.to(out.dtype)
    return shifted if residual is None else shifted + residual


def plain_dgrad(g: Tensor, x: Tensor, weight: Tensor, site: Site) -> Tensor:
    only_input = [True, False, False]
    of = torch.ops.aten.convolution_backward
    found: Tensor = of(g, x, weight, None, site.stride, site.padding, [1, 1], False, [0, 0], 1, only_input)[0]
    return found


@dataclass(frozen=True)
class Arm:
    """Where it applies, what it prepares once a step, and which parts of the plain form it replaces.

    applies: (site, weight, x, residual) -> bool, of a convolution without groups and dilation, padded with zeros
    prepare: (weight, shift, site) -> tensors of its own, handed to what is called with `own`
    widen:   (x, own) -> x and weight that the convolution takes
    forward: (x, residual, weight, shift, own, site) -> output, and what `let` reads
    let:     (that, g) -> g where the ReLU let its input through, else 0
    dgrad:   (g, own, site, size) -> gradient of the input of that size
    """

    applies: Callable[[Site, Tensor, Tensor, Tensor | None], bool]
    prepare: Callable[[Tensor, Tensor, Site], list[Tensor]] = lambda weight, shift, site: []
    widen: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]] | None = None
    forward: Callable[[Tensor, Tensor | None, Tensor, Tensor, Sequence[Tensor], Site], tuple[Tensor, Tensor]] | None = (
        None
    )
    let: Callable[[Tensor, Tensor], Tensor] | None = None
    dgrad: Callable[[Tensor, Sequence[Tensor], Site, Sequence[int]], Tensor] | None = None


def _fits(site: Site, weight: Tensor, x: Tensor, residual: Tensor | None) -> bool:
    """Whether a residual has the output's shape and type, so that it is nothing but added."""
    out = [x.shape[0], weight.shape[0], *out_size(x.shape[2:], site.kernel, site.stride, site.padding)]
    return residual is None or (residual.dtype == weight.dtype and list(residual.shape) == out)


def _fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, own: Sequence[Tensor], site: Site
) -> tuple[Tensor, Tensor]:
    out = conv_relu(x, weight, own[0], residual, site.stride, site.padding)
    return out, out


def _bits(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, own: Sequence[Tensor], site: Site
) -> tuple[Tensor, Tensor]:
    before = plain_sum(x, residual, weight, shift, site)
    words = pack(~(before <= 0))
    # Of the words and not of `before`: else a compiler packs them in the backward pass, from the output.
    return torch.where(unpack(words), before, 0), words


ARMS: dict[str, Arm] = {
    "fused": Arm(
        applies=lambda site, weight, x, residual: site.relu and _fits(site, weight, x, residual),
        prepare=lambda weight, shift, site: [shift.to(weight.dtype)],
        forward=_fused,
    ),
    "turned": Arm(
        applies=_fits,
        prepare=lambda weight, shift, site: turned_weights(weight, site.stride, site.padding),
        dgrad=lambda g, own, site, size: turned_gradient(g, own, site.kernel, site.stride, site.padding, size),
    ),
    "bits": Arm(
        applies=lambda site, weight, x, residual: (
            site.relu and weight.shape[0] % WORD == 0 and _fits(site, weight, x, residual)
        ),
        forward=_bits,
        let=lambda words, g: torch.where(unpack(words), g, 0),
    ),
    "padded": Arm(
        applies=lambda site, weight, x, residual: weight.shape[1] < CHANNELS and _fits(site, weight, x, residual),
        prepare=lambda weight, shift, site: [_padded(weight).contiguous(memory_format=torch.channels_last)],
        widen=lambda x, own: (_padded(x).contiguous(memory_format=torch.channels_last), own[0]),
    ),
}


def goes_together(form: Form) -> bool:
    """Whether no two arms of the form are in each other's place."""
    places = [[arm.widen, arm.forward, arm.dgrad] for arm in (ARMS[name] for name in form)]
    return all(sum(part is not None for part in parts) <= 1 for parts in zip(*places, strict=True))


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, CHANNELS - x.shape[1]))


def site_of(conv: nn.Conv2d, relu: bool) -> Site | None:
    """The site of a convolution that arms may apply to, or None."""
    if conv.groups != 1 or tuple(conv.dilation) != (1, 1) or conv.padding_mode != "zeros":
        return None
    if isinstance(conv.padding, str):
        return None
    kernel, stride, padding = ((int(a), int(b)) for a, b in (conv.kernel_size, conv.stride, conv.padding))
    return Site(kernel, stride, padding, relu)


def joined(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    site: Site,
    form: Form,
    prepared: Sequence[Sequence[Tensor]],
) -> Tensor:
    """relu(conv(x) + shift + residual) of a site, by the arms of a form; prepared: what each of them prepared."""
    counts = tuple(len(own) for own in prepared)
    tensors = [tensor for own in prepared for tensor in own]
    result: Tensor = Joined.apply(x, residual, weight, shift, tuple(site), form, counts, *tensors)
    return result


class Joined(torch.autograd.Function):
    """A convolution and what follows it, put together from the parts of several arms, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        shift: Tensor,
        fixed: tuple[Any, ...],
        form: Form,
        counts: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:
        site, own = Site(*fixed), _shared_out(form, counts, tensors)
        found = None
        ctx.channels, ctx.size = x.shape[1], tuple(x.shape[2:])
        for name in form:
            widen = ARMS[name].widen
            if widen is not None:
                x, weight = widen(x, own[name])
        for name in form:
            forward = ARMS[name].forward
            if forward is not None:
                found = forward(x, residual, weight, shift, own[name], site)
        if found is None:
            out = plain_sum(x, residual, weight, shift, site)
            out = out.relu() if site.relu else out
            found = out, out
        # An output without a ReLU is not kept: what follows may write into it.
        ctx.save_for_backward(x, weight, *tensors, *([found[1]] if site.relu else []))
        ctx.fixed, ctx.form, ctx.counts, ctx.residual = fixed, form, counts, residual is not None
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, *rest = ctx.saved_tensors
        tensors = rest[: sum(ctx.counts)]
        site, own = Site(*ctx.fixed), _shared_out(ctx.form, ctx.counts, tensors)
        let, dx = None, None
        for name in ctx.form:
            let = ARMS[name].let or let
        if site.relu:
            kept = rest[-1]
            g = torch.where(kept <= 0, 0, g) if let is None else let(kept, g)
        for name in ctx.form:
            dgrad = ARMS[name].dgrad
            if dgrad is not None:
                dx = dgrad(g, own[name], site, ctx.size)
        if dx is None:
            dx = plain_dgrad(g, x, weight, site)[:, : ctx.channels]
        return dx, g if ctx.residual else None, *(None,) * (5 + len(tensors))


def _shared_out(form: Form, counts: Sequence[int], tensors: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    found, first = {}, 0
    for name, count in zip(form, counts, strict=True):
        found[name] = tensors[first : first + count]
        first += count
    return found
