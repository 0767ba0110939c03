"""Literal transcriptions of the methods in float64, each training `net` in place, written from the cited sources.

They import nothing of fastafd. `starts` and `etas` are the draws that a method makes for each batch.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

EPS = 8 / 255


def cos(u, v):
    """Per sample over the features, then the batch mean."""
    return ((u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))).mean()


def kl(z, z_adv):
    """(1/n) sum KL(p(x) || p(x')) of the softmaxes of two sets of logits; neither argument is stopped."""
    log_p, log_q = F.log_softmax(z, 1), F.log_softmax(z_adv, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def ascend(loss, x, start, size, eps=EPS, steps=10):
    """Signed steps up `loss` from `start`; into the eps-ball, then into [0,1], after each. The start is not clipped."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = x_adv.detach() + size * grad.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    return x_adv


def pgd(net, x, y, noise, size=2 / 255):
    """Ten steps on the cross-entropy from x + noise, net in eval mode."""
    net.eval()
    x_adv = ascend(lambda x_adv: F.cross_entropy(net(x_adv), y), x, x + noise, size)
    net.train()
    return x_adv


def vaft(net: nn.Module, data, starts) -> None:
    """Source: github.com/changzhang777/AFD, ARREST.py with --RGKD and --NR off; no average."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
    for (x, y), noise in zip(data, starts, strict=True):
        x_adv = pgd(net, x, y, noise)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y).backward()
        optimizer.step()


def pgd_at(net: nn.Module, data, starts) -> None:
    """Madry et al., arXiv 1706.06083, as run here: AFD's attack (unclipped start, eval mode); no average."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    for (x, y), noise in zip(data, starts, strict=True):
        x_adv = pgd(net, x, y, noise)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y).backward()
        optimizer.step()


def trades(net: nn.Module, data, starts) -> None:
    """Source: github.com/yaodongyu/TRADES, trades.py (l_inf) and train_trades_cifar10.py; no average.

    Two differences. eps is 8/255, there 0.031. And one clean pass here: the source runs the clean batch a second time,
    after the adversarial one, for p(x) in the KL. The batch's loss and gradient are the same, BatchNorm's running
    statistics are not: they move three times a batch there (clean, adversarial, clean), twice here (clean,
    adversarial), and the next attack, in eval mode, sees the difference.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    for (x, y), normal in zip(data, starts, strict=True):
        net.eval()
        with torch.no_grad():
            clean = net(x)
        x_adv = ascend(lambda x_adv, clean=clean: kl(clean, net(x_adv)), x, x + 0.001 * normal, 0.007)
        net.train()
        optimizer.zero_grad()
        z = net(x)
        z_adv = net(x_adv)
        (F.cross_entropy(z, y) + 6 * kl(z, z_adv)).backward()
        optimizer.step()


def afkd(net: nn.Module, data, starts) -> None:
    """Source: github.com/changzhang777/AFD, ARREST.py with --RGKD, without --NR; no average.

    One difference: the teacher is in eval mode; the script never puts it there.
    """
    teacher = copy.deepcopy(net[:-1]).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
    for (x, y), noise in zip(data, starts, strict=True):
        x_adv = pgd(net, x, y, noise)
        with torch.no_grad():
            natural = teacher(x)
        optimizer.zero_grad()
        g = net[:-1](x_adv)
        (F.cross_entropy(net[-1](g), y) + 50 * (1 - cos(natural, g))).backward()
        optimizer.step()


def arrest(net: nn.Module, data, starts, epochs) -> list[bool]:
    """Source: github.com/changzhang777/AFD, ARREST.py with --RGKD and --NR; no average. Returns who was replayed.

    Differences: the teacher is in eval mode, and the learning rate is the first ten epochs' throughout; `epochs` only
    opens and shuts noisy replay.
    """
    teacher = copy.deepcopy(net[:-1]).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
    replayed = []
    for (x, y), noise, epoch in zip(data, starts, epochs, strict=True):
        net.eval()
        with torch.no_grad():
            natural = teacher(x)
            distance = 1 - cos(natural, net[:-1](x))
        replayed.append(bool(distance >= 1 - 3**0.5 / 2) and epoch <= 10)  # cos(30 degrees)
        x_adv = torch.clamp(x + noise, 0, 1) if replayed[-1] else pgd(net, x, y, noise)
        net.train()
        optimizer.zero_grad()
        g = net[:-1](x_adv)
        (F.cross_entropy(net[-1](g), y) + 50 * (1 - cos(natural, g))).backward()
        optimizer.step()
    return replayed


def afd(net: nn.Module, data, starts, alpha, sigma, gamma):
    """Source: github.com/changzhang777/AFD, tl+sl.py: what its three optimizers come to, without its average.

    Its two SGDs on theta1 (all but D2) add up to one on 2 sigma L2 + L3 with twice the weight decay; L1 is added to
    D2's gradient once and, since nothing is zeroed between the backwards, to the classifier's for both of the two.
    """
    backbone, linear = net[:-1], net[-1]
    teacher = copy.deepcopy(backbone).eval()
    width = linear.in_features
    d1, d2 = (nn.Linear(width, width, bias=False).double() for _ in range(2))
    for block in (d1, d2):
        block.weight.data = torch.eye(width, dtype=torch.float64)
    attacked = nn.Sequential(backbone, d1, linear)
    theta1, theta2, omega = list(attacked.parameters()), list(d2.parameters()), list(linear.parameters())
    groups = [{"params": theta1, "weight_decay": 1e-3}, {"params": theta2, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.025, momentum=0.9)
    for (x, y), noise in zip(data, starts, strict=True):
        x_adv = pgd(attacked, x, y, noise, size=0.007)
        with torch.no_grad():
            natural = teacher(x)
        g = backbone(x_adv)
        f1, f2 = d1(g), d2(g.detach())
        z1, z2 = linear(f1), linear(f2)
        wrong = z1.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
        l1 = F.cross_entropy(z2, wrong)
        l2 = cos(f1, f2.detach())
        l3 = F.cross_entropy(z1, y) + gamma * (1 - cos(f1, natural))
        of_l1 = torch.autograd.grad(alpha * l1, theta2 + omega, retain_graph=True)
        for p, grad in zip(theta1, torch.autograd.grad(2 * sigma * l2 + l3, theta1), strict=True):
            p.grad = grad
        for p, grad in zip(theta2, of_l1[: len(theta2)], strict=True):
            p.grad = grad
        for p, grad in zip(omega, of_l1[len(theta2) :], strict=True):
            p.grad += 2 * grad
        optimizer.step()
    return backbone, d1, d2, linear


def vaft_d(net: nn.Module, data, starts):
    """Table 3, vAFT + D: AFD without the term that pulls towards the teacher."""
    return afd(net, data, starts, alpha=0.05, sigma=0.25, gamma=0.0)


def vaft_a(net: nn.Module, data, starts):
    """Table 3, vAFT + A: cross-entropy and the pull towards the teacher alone, D1 kept. D2 gets but weight decay."""
    return afd(net, data, starts, alpha=0.0, sigma=0.0, gamma=25.0)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def free_at(net, data, rates, replays=4, eps=EPS):
    """Free adversarial training; returns the last delta. rates[k]: learning rate of update k, replays counted.

    Source: github.com/locuslab/fast_adversarial, CIFAR10/train_free.py. Followed from it: the forward is on x + delta
    as it stands, not clipped to [0,1] (in the first replay of a batch delta is still the previous batch's, so x + delta
    may leave [0,1] there); everything in train mode; delta and the weights both move by the gradients of one backward
    (delta first, which changes nothing); delta to the eps-ball, then to x + delta in [0,1]; zeros only once.
    """
    net.train()
    optimizer = sgd(net.parameters())
    delta = torch.zeros_like(data[0][0]).requires_grad_()
    k = 0
    for x, y in data:
        for _ in range(replays):
            optimizer.param_groups[0]["lr"] = rates[k]
            optimizer.zero_grad()
            delta.grad = None
            F.cross_entropy(net(x + delta), y).backward()
            with torch.no_grad():
                delta.copy_(torch.clamp(delta + eps * delta.grad.sign(), -eps, eps))
                delta.copy_(torch.max(torch.min(delta, 1 - x), -x))
            optimizer.step()
            k += 1
    return delta.detach()


def fgsm_ga(net, data, etas, rates, eps=EPS, weight=0.2):
    """FGSM with GradAlign. etas[i]: the uniform point of batch i; rates[i]: its learning rate.

    Source: github.com/tml-epfl/understanding-fast-adv-training, train.py with --attack fgsm --attack_init zero. Three
    train-mode forwards in this order: x, x + delta, x + eta (not clipped to [0,1]); cross-entropies are batch means.
    The gradient at x is one and the same for FGSM and the regulariser, and constant. It is taken at x itself (the
    source's clip of x + 0 differs from that only in the gradient at pixels that are exactly 0 or 1).
    """
    net.train()
    optimizer = sgd(net.parameters())
    for i, (x, y) in enumerate(data):
        optimizer.param_groups[0]["lr"] = rates[i]
        point = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(point), y), point)
        delta = torch.clamp(1.25 * eps * grad.sign(), -eps, eps)
        delta = torch.clamp(x + delta, 0, 1) - x
        loss = F.cross_entropy(net(x + delta), y)
        point = (x + etas[i]).requires_grad_()
        (other,) = torch.autograd.grad(F.cross_entropy(net(point), y), point, create_graph=True)
        grad, other = grad.flatten(1), other.flatten(1)
        kept = (grad.norm(dim=1) != 0) & (other.norm(dim=1) != 0)
        grad, other = grad[kept], other[kept]
        cosine = (grad * other).sum(1) / (grad.norm(dim=1) * other.norm(dim=1))
        loss = loss + weight * (1 - cosine.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def crop_flip(images, offsets, flips, height, width):
    """The window of each padded image at its (row, column) offset, then flipped left to right where flips."""
    out = []
    for image, (row, column), flip in zip(images, offsets.tolist(), flips.tolist(), strict=True):
        window = image[:, row : row + height, column : column + width]
        out.append(window.flip(2) if flip else window)
    return torch.stack(out)


def atas(
    net, epochs, deltas, rates, resets=None, padding=1, warmup=1, beta=0.5, c=0.01, low=4 / 255, high=14 / 255, eps=EPS
):
    """ATAS; returns the last deltas and v. deltas[0]: the first ones; resets: epoch from 0 -> what replaces them all.

    Source: github.com/HuangZhiChao95/ATAS, ATAS.py, adv_attack.py, data_aug.py (CIFAR branch). Followed from it: in the
    warm-up epochs the step is eps and v stays as it is (0); later v is updated before it is used; the start is clipped
    to [0,1] only (delta is in the ball already); the gradient of the batch mean, in eval mode, at the augmented start;
    the zero padding is perturbed like the image; delta outside the window is kept; a reset keeps v.
    """
    optimizer = sgd(net.parameters())
    stored = deltas[0].clone()
    v = torch.zeros(len(stored), dtype=stored.dtype)
    for e, epoch in enumerate(epochs):
        if resets and e in resets:
            stored = resets[e].clone()
        optimizer.param_groups[0]["lr"] = rates[e]
        for indices, x0, y, offsets, flips in epoch:
            height, width = x0.shape[2:]
            x = crop_flip(F.pad(x0, [padding] * 4), offsets, flips, height, width)
            start = torch.clamp(x + crop_flip(stored[indices], offsets, flips, height, width), 0, 1).requires_grad_()
            net.eval()
            (grad,) = torch.autograd.grad(F.cross_entropy(net(start), y), start)
            if e < warmup:
                size = eps
            else:
                v[indices] = beta * v[indices] + (1 - beta) * grad.flatten(1).norm(dim=1) ** 2
                size = torch.clamp(2 * 8 / 255 / (1 + v[indices].sqrt() / c), low, high)[:, None, None, None]
            x_adv = start.detach() + size * grad.sign()
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
            net.train()
            optimizer.zero_grad()
            F.cross_entropy(net(x_adv), y).backward()
            optimizer.step()
            for n, i in enumerate(indices.tolist()):
                (row, column), change = offsets[n].tolist(), x_adv[n] - x[n]
                change = change.flip(2) if flips[n] else change
                stored[i, :, row : row + height, column : column + width] = change
    return stored, v


def rift_criticality(net, x_adv, y, steps=10, lr=1.0, radius=0.1):
    """Robust criticality of each Conv2d and Linear weight: name -> most loss on x_adv over the steps, minus the loss.

    Source: github.com/microsoft/robustlearn, RiFT/main.py, layer_sharpness, with the whole set as one batch. Eval mode;
    plain gradient ascent; after each epoch the change is scaled back to radius * ||W||_F if it is longer, and the loss
    is measured after that; the highest of these counts, not the last. net is left as it is.
    """
    with torch.no_grad():
        origin = F.cross_entropy(copy.deepcopy(net).eval()(x_adv), y).item()
    result = {}
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        moved = copy.deepcopy(net).eval()
        weight = moved.get_parameter(f"{name}.weight")
        first, most = weight.detach().clone(), 0.0
        for _ in range(steps):
            (grad,) = torch.autograd.grad(F.cross_entropy(moved(x_adv), y), weight)
            with torch.no_grad():
                weight += lr * grad
                change = weight - first
                ratio = change.norm() / first.norm()
                if ratio > radius:
                    weight.copy_(first + change / ratio * radius)
                most = max(most, F.cross_entropy(moved(x_adv), y).item())
        result[name] = most - origin
    return result


def rift_finetune(net, name, data, rates):
    """Fine-tuning of one module's weight on clean data; net in train mode, so every BatchNorm's statistics move.

    Source: github.com/microsoft/robustlearn, RiFT/main.py, train (there a bias of the module would be trained too).
    """
    net.train()
    weight = net.get_parameter(f"{name}.weight")
    optimizer = sgd([weight])
    for (x, y), rate in zip(data, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        (weight.grad,) = torch.autograd.grad(F.cross_entropy(net(x), y), weight)
        optimizer.step()


def rift_interpolate(a, b, alpha):
    """Source: github.com/microsoft/robustlearn, RiFT/utils.py, interpolation: whole state dicts, buffers too."""
    return {k: (1 - alpha) * a[k] + alpha * b[k] if a[k].is_floating_point() else a[k].clone() for k in a}
