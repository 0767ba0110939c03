"""Other forms of the attack's convolutions: the same results from other kernels. `ARMS` is the table of them.

    plain     convolution, shift, residual, ReLU; aten::convolution_backward gives the input's gradient fused     cuDNN
    computes shift, residual and ReLU inside the convolution turned    the input's gradient is forward convolutions with
    weights that were flipped beforehand: one at stride 1; at
              stride s one for each of the s x s positions of a pixel, with the taps that reach it
    bits      a mask keeps where the ReLU was active, one bit a channel, 32 channels an int32: the gradient reads 1/16
    of
              the bytes of a bf16 output. PyTorch 2.11 makes two kernels of it, which move more bytes than the plain
              form
    padded    the first convolution's input and weight are padded with zeros to 8 channels

A form is a tuple of arms; () is the plain form. Only the gradients of the images and of the residual exist. An arm says
which convolutions it applies to; for these it equals the plain form in float64 (tests/test_arms.py).
`fastafd.attacks.choice` decides which convolution gets which form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.attacks.conv_relu import conv_relu, out_size

CHANNELS, WORD = 8, 32  # channels of the padded input; bits of a word
Form = tuple[str, ...]
Pair = tuple[int, int]


class Site(NamedTuple):
    """The settings of a convolution, and whether a ReLU follows it."""

    kernel: Pair
    stride: Pair
    padding: Pair
    relu: bool


# -- turned -------------------------------------------------------------------------------------------------------


def turned_weights(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> list[Tensor]:
    """The weights (C,D,k',l') of the convolutions that give the input's gradient: one for each position with taps."""
    kernel = weight.shape[2:]
    weights = []
    for row in range(stride[0]):
        for column in range(stride[1]):
            first = (row + padding[0]) % stride[0], (column + padding[1]) % stride[1]
            if first[0] < kernel[0] and first[1] < kernel[1]:
                taps = weight[:, :, first[0] :: stride[0], first[1] :: stride[1]]
                weights.append(taps.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last))
    return weights


def turned_gradient(
    g: Tensor,
    turned: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """The gradient (B,C,H,W) of a convolution's input, from g (B,D,h,w), the gradient of its output.

    turned: the result of `turned_weights`; size: (H, W). Output pixel i reaches input pixel s j + a through the tap
    a + padding - s (i - j). So for each position a (of s, in rows and in columns) the gradient is a convolution of g
    with stride 1 and every s-th tap in reverse order.
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
    """Booleans (B,C,H,W) as int32 (B,H,W,C/32): channel c is bit c % 32 of word c // 32."""
    bits = on.permute(0, 2, 3, 1).unflatten(3, (-1, WORD)).to(torch.int32)
    places = torch.arange(WORD, dtype=torch.int32, device=on.device)
    return (bits << places).sum(-1, dtype=torch.int32)  # the terms share no bit, so their sum is their union


def unpack(words: Tensor) -> Tensor:
    """The booleans (B,C,H,W) that `pack` packed."""
    places = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(-1) >> places) & 1
    return bits.flatten(3).permute(0, 3, 1, 2) != 0


# -- the table ----------------------------------------------------------------------------------------------------


def plain_sum(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, site: Site) -> Tensor:
    """The convolution plus its shift and the residual: the input of the ReLU."""
    out = F.conv2d(x, weight, None, site.stride, site.padding)
    shifted = out + shift[:, None, None]
    # Avoid a `.to` that returns its input: PyTorch 2.11 loses the gradient of a Function whose output is an alias.
    shifted = shifted if shifted.dtype == out.dtype else shifted.to(out.dtype)
    return shifted if residual is None else shifted + residual


def plain_dgrad(g: Tensor, x: Tensor, weight: Tensor, site: Site) -> Tensor:
    """The gradient of the convolution's input, from g, the gradient of its output."""
    only_input = [True, False, False]
    backward = torch.ops.aten.convolution_backward
    dx: Tensor = backward(g, x, weight, None, site.stride, site.padding, [1, 1], False, [0, 0], 1, only_input)[0]
    return dx


@dataclass(frozen=True)
class Arm:
    """Which convolutions an arm applies to, what it prepares once a step, and which parts of the plain form it
    replaces.

    applies: (site, weight, x, residual) -> bool, for a convolution without groups and dilation, padded with zeros
    prepare: (weight, shift, site) -> the tensors that the other functions get as `prepared`
    widen:   (x, prepared) -> the x and the weight that the convolution takes
    forward: (x, residual, weight, shift, prepared, site) -> the output, and the mask that `let` reads
    let:     (mask, g) -> g where the ReLU was active, else 0
    dgrad:   (g, prepared, site, size) -> the gradient of the input of that size
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
    """True if there is no residual, or if it has the output's shape and type, so that it is simply added."""
    out = [x.shape[0], weight.shape[0], *out_size(x.shape[2:], site.kernel, site.stride, site.padding)]
    return residual is None or (residual.dtype == weight.dtype and list(residual.shape) == out)


def _fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, prepared: Sequence[Tensor], site: Site
) -> tuple[Tensor, Tensor]:
    out = conv_relu(x, weight, prepared[0], residual, site.stride, site.padding)
    return out, out


def _bits(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, prepared: Sequence[Tensor], site: Site
) -> tuple[Tensor, Tensor]:
    before = plain_sum(x, residual, weight, shift, site)
    words = pack(~(before <= 0))
    # Read the words, not `before`: else the compiler packs them in the backward pass, from the output.
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
        dgrad=lambda g, prepared, site, size: turned_gradient(
            g, prepared, site.kernel, site.stride, site.padding, size
        ),
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
        widen=lambda x, prepared: (_padded(x).contiguous(memory_format=torch.channels_last), prepared[0]),
    ),
}


def goes_together(form: Form) -> bool:
    """True if no two arms of the form replace the same part."""
    places = [[arm.widen, arm.forward, arm.dgrad] for arm in (ARMS[name] for name in form)]
    return all(sum(part is not None for part in parts) <= 1 for parts in zip(*places, strict=True))


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, CHANNELS - x.shape[1]))


def site_of(conv: nn.Conv2d, relu: bool) -> Site | None:
    """The site of a convolution, or None if no arm can apply to it."""
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
    """relu(conv(x) + shift + residual) in a form; prepared: the tensors that each of its arms prepared."""
    counts = tuple(len(of_arm) for of_arm in prepared)
    tensors = [tensor for of_arm in prepared for tensor in of_arm]
    result: Tensor = Joined.apply(x, residual, weight, shift, tuple(site), form, counts, *tensors)
    return result


class Joined(torch.autograd.Function):
    """A convolution with shift, residual and ReLU, put together from the parts of several arms; differentiable once."""

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
        site, prepared = Site(*fixed), _by_arm(form, counts, tensors)
        output = None
        ctx.channels, ctx.size = x.shape[1], tuple(x.shape[2:])
        for name in form:
            widen = ARMS[name].widen
            if widen is not None:
                x, weight = widen(x, prepared[name])
        for name in form:
            forward = ARMS[name].forward
            if forward is not None:
                output = forward(x, residual, weight, shift, prepared[name], site)
        if output is None:
            out = plain_sum(x, residual, weight, shift, site)
            out = out.relu() if site.relu else out
            output = out, out
        # Without a ReLU the output is not saved, because later operations may write into it.
        ctx.save_for_backward(x, weight, *tensors, *([output[1]] if site.relu else []))
        ctx.fixed, ctx.form, ctx.counts, ctx.residual = fixed, form, counts, residual is not None
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, *rest = ctx.saved_tensors
        tensors = rest[: sum(ctx.counts)]
        site, prepared = Site(*ctx.fixed), _by_arm(ctx.form, ctx.counts, tensors)
        let, dx = None, None
        for name in ctx.form:
            let = ARMS[name].let or let
        if site.relu:
            mask = rest[-1]
            g = torch.where(mask <= 0, 0, g) if let is None else let(mask, g)
        for name in ctx.form:
            dgrad = ARMS[name].dgrad
            if dgrad is not None:
                dx = dgrad(g, prepared[name], site, ctx.size)
        if dx is None:
            dx = plain_dgrad(g, x, weight, site)[:, : ctx.channels]
        return dx, g if ctx.residual else None, *(None,) * (5 + len(tensors))


def _by_arm(form: Form, counts: Sequence[int], tensors: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """The prepared tensors of each arm, cut out of the flat sequence of all of them."""
    by_arm, first = {}, 0
    for name, count in zip(form, counts, strict=True):
        by_arm[name] = tensors[first : first + count]
        first += count
    return by_arm
