"""The AFD step against literal float64 transcriptions of its sources, which import nothing from fastafd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastafd
from fastafd.kernels import afd_loss
from fastafd.recipes import find_recipe
from fastafd.training.optim import make_sgd

BATCH, CLASSES = 16, 5


def small_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    body = [
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*body, nn.Linear(32, CLASSES)).double()


def batches(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def cos(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))).mean()


class Transcription:
    """One batch of the released script, written down as it is there: three SGD objects over two sets of parameters.

    One difference: here the third backward pass uses the weights of the forward pass. In the script it goes through
    weights that the second optimizer has changed in place, which current PyTorch refuses.
    Source: github.com/changzhang777/AFD, tl+sl.py (order of zeroing, backwards and steps; losses; EMA).
    """

    def __init__(self, net: nn.Module, lr: float, weight_decay: float):
        self.backbone, self.linear = copy.deepcopy(net[:-1]), copy.deepcopy(net[-1])
        width = self.linear.in_features
        self.d1, self.d2 = (nn.Linear(width, width, bias=False).double() for _ in range(2))
        for block in (self.d1, self.d2):
            block.weight.data = torch.eye(width, dtype=torch.float64)
        self.rest = [*self.backbone.parameters(), *self.linear.parameters(), *self.d1.parameters()]
        self.teacher = copy.deepcopy(net[:-1]).eval()
        options = {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay}
        self.opt1 = torch.optim.SGD(self.d2.parameters(), **options)
        self.opt2 = torch.optim.SGD(self.rest, **options)
        self.opt = torch.optim.SGD(self.rest, **options)
        self.modules = nn.ModuleList([self.backbone, self.d1, self.d2, self.linear])
        self.ema = [t.detach().clone() for t in self.state()]
        self.t = 0

    def state(self) -> list[torch.Tensor]:
        return [v for v in self.modules.state_dict().values() if v.is_floating_point()]

    def attack(self, x, y, noise, eps=8 / 255, step=0.007, steps=10):
        self.backbone.eval()
        x_adv = x + noise
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(self.linear(self.d1(self.backbone(x_adv))), y)
            grad = torch.autograd.grad(loss, x_adv)[0]
            x_adv = x_adv.detach() + step * torch.sign(grad)
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
            x_adv = torch.clamp(x_adv, 0, 1)
        self.backbone.train()
        return x_adv.detach()

    def step(self, x, x_adv, y, alpha=0.05, sigma=0.25, gamma=25.0):
        g = self.backbone(x_adv)
        f1, f2 = self.d1(g), self.d2(g.detach())
        z1, z2 = self.linear(f1), self.linear(f2)
        masked = z1.detach().clone()
        masked[torch.arange(len(y)), y] = -1e30
        wrong = masked.argmax(1)
        with torch.no_grad():
            teacher = self.teacher(x)
        everything = [*self.rest, *self.d2.parameters()]
        grads = [
            torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True)
            for loss in (
                alpha * F.cross_entropy(z2, wrong),
                sigma * cos(f1, f2),
                F.cross_entropy(z1, y) + gamma * (1 - cos(f1, teacher)),
            )
        ]
        for p in everything:
            p.grad = torch.zeros_like(p)
        for optimizer_grads, optimizer in zip(grads, (self.opt1, self.opt2, self.opt), strict=True):
            for p, grad in zip(everything, optimizer_grads, strict=True):
                if grad is not None:
                    p.grad += grad
            optimizer.step()
        decay = min(0.999, (1 + self.t) / (10 + self.t))
        self.t += 1
        self.ema = [decay * old + (1 - decay) * new for old, new in zip(self.ema, self.state(), strict=True)]


def run_both(weight_decay: float, steps: int = 20, lr: float = 0.025):
    """Twenty steps of the transcription and of AFDStep from the same state and noise.

    Returns their states and averages.
    """
    net = small_net(1)
    literal = Transcription(net, lr, weight_decay)
    model = fastafd.disentangle(net)
    optimizer = make_sgd(model, lr, 0.9, 2 * weight_decay, weight_decay)
    step = fastafd.AFDStep(model, net, optimizer, recipe="released", amp="fp32")
    noise_of = torch.Generator().manual_seed(0)
    for x, y in batches(steps):
        noise = torch.empty_like(x, memory_format=torch.channels_last).uniform_(-8 / 255, 8 / 255, generator=noise_of)
        literal.step(x, literal.attack(x, y, noise), y)
        step(x, y)
    ours = [v for name, v in state_in_order(model) if v.is_floating_point()]
    mean = [v for name, v in state_in_order(step.averaged()) if v.is_floating_point()]
    return literal, ours, mean


def state_in_order(model: fastafd.Disentangled):
    parts = [model.backbone, model.d1, model.d2, model.classifier]
    return [(name, value) for part in parts for name, value in part.state_dict().items()]


def worst(ours, theirs) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(ours, theirs, strict=True))


def overall(ours, theirs) -> float:
    return worst([torch.cat([v.flatten() for v in ours])], [torch.cat([v.flatten() for v in theirs])])


def test_released_step_is_the_three_optimizer_script_without_weight_decay():
    literal, ours, mean = run_both(weight_decay=0.0)
    assert worst(ours, literal.state()) < 1e-12
    assert worst(mean, literal.ema) < 1e-12


def test_released_step_is_the_three_optimizer_script_but_for_the_intermediate_weight_decay():
    """The script's second optimizer decays weights that the first one has moved.

    The effect is about lr * weight decay.
    """
    literal, ours, mean = run_both(weight_decay=5e-4)
    assert overall(ours, literal.state()) < 1e-5
    assert overall(mean, literal.ema) < 1e-5


def test_the_transcription_is_not_the_paper_recipe():
    """The comparison can fail: the paper's recipe (Eq. 6 as printed) makes another update."""
    net = small_net(1)
    literal = Transcription(net, 0.025, 0.0)
    model = fastafd.disentangle(net)
    step = fastafd.AFDStep(model, net, make_sgd(model, 0.025, 0.9, 0.0, 0.0), recipe="paper", amp="fp32")
    noise_of = torch.Generator().manual_seed(0)
    for x, y in batches(20):
        noise = torch.empty_like(x, memory_format=torch.channels_last).uniform_(-8 / 255, 8 / 255, generator=noise_of)
        literal.step(x, literal.attack(x, y, noise), y)
        step(x, y)
    assert worst([v for _, v in state_in_order(model) if v.is_floating_point()], literal.state()) > 1e-4


# -- the loss -----------------------------------------------------------------------------------------------------


def operands(seed: int = 3, batch: int = 7, width: int = 6, classes: int = 4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    g, t, d1, d2, w, b = (
        draw(batch, width),
        draw(batch, width),
        draw(width, width),
        draw(width, width),
        draw(classes, width),
        draw(classes),
    )
    return g, t, torch.randint(0, classes, (batch,), generator=generator), d1, d2, w, b


def test_afd_loss_is_equation_six_with_its_stops():
    g, t, y, d1, d2, w, b = operands()
    out = afd_loss(g, t, y, d1, d2, w, b, alpha=0.3, beta=0.7, gamma=2.0)
    f1, f2 = g @ d1.T, g @ d2.T
    z1, z2 = f1 @ w.T + b, f2 @ w.T + b
    others = z1.detach().clone()
    others[torch.arange(7), y] = -torch.inf
    wrong = others.argmax(1)
    confused, exclusion = F.cross_entropy(z2, wrong), -(1 - cos(f1, f2))
    cross_entropy, alignment = F.cross_entropy(z1, y), 1 - cos(f1, t)
    torch.testing.assert_close(out.total, 0.3 * confused + 0.7 * exclusion + cross_entropy + 2 * alignment)
    expected = {"confused": confused, "exclusion": exclusion, "cross_entropy": cross_entropy, "alignment": alignment}
    for name, value in expected.items():
        torch.testing.assert_close(out.terms[name], value.detach())
    assert torch.equal(out.wrong_labels, wrong) and not (out.wrong_labels == y).any()
    torch.testing.assert_close(out.logits, z1.detach())
    out.total.backward()
    (d2_only,) = torch.autograd.grad(0.3 * confused, d2, retain_graph=True)
    torch.testing.assert_close(d2.grad, d2_only)  # Eq. 4 stops the gradient of its second argument
    stopped = 0.7 * -(1 - cos(f1, f2.detach())) + cross_entropy + 2 * (1 - cos(f1, t.detach()))
    for leaf, grad in zip((g, d1, w, b), torch.autograd.grad(stopped, (g, d1, w, b)), strict=True):
        torch.testing.assert_close(leaf.grad, grad)  # Eq. 3 gives none of these a gradient
    assert t.grad is None


def test_classifier_alpha_adds_gradient_to_the_classifier_and_nothing_to_the_value():
    def grads(extra):
        g, t, y, d1, d2, w, b = operands()
        out = afd_loss(g, t, y, d1, d2, w, b, alpha=0.3, classifier_alpha=extra)
        return out.total.detach(), torch.autograd.grad(out.total, (g, d1, d2, w, b))

    (total, plain), (same, shared) = grads(0.0), grads(0.6)
    torch.testing.assert_close(total, same)
    for index in range(3):
        torch.testing.assert_close(plain[index], shared[index])
    g, t, y, d1, d2, w, b = operands()
    wrong = afd_loss(g, t, y, d1, d2, w, b).wrong_labels
    extra = torch.autograd.grad(0.6 * F.cross_entropy((g @ d2.T).detach() @ w.T + b, wrong), (w, b))
    torch.testing.assert_close(shared[3] - plain[3], extra[0])
    torch.testing.assert_close(shared[4] - plain[4], extra[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_type_of_the_features_decides_and_autocast_changes_nothing(dtype):
    """Products are computed in the features' type, losses in fp32, and each gradient has its operand's type."""
    g, t, y, d1, d2, w, b = operands(dtype=torch.float32)
    low, teacher = g.detach().to(dtype).requires_grad_(), t.detach().to(dtype)

    def both():
        out = afd_loss(low, teacher, y, d1, d2, w, b)
        return out, torch.autograd.grad(out.total, (low, d1, d2, w, b))

    plain, plain_grads = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = both()
    assert torch.equal(out.total, plain.total) and torch.equal(out.logits, plain.logits)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
    assert [grad.dtype for grad in grads] == [dtype] + 4 * [torch.float32]
    assert out.total.dtype == out.logits.dtype == torch.float32
    wide = [v.double() for v in (low.detach(), teacher)]
    exact = afd_loss(*wide, y, *(v.detach().double() for v in (d1, d2, w, b)))
    precision = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.total.detach().double(), exact.total, rtol=precision, atol=0)


def test_edge_batches_stay_finite():
    g, t, y, d1, d2, w, b = operands()
    with torch.no_grad():
        g[0] = 0  # a zero vector has no direction
        w *= 1e4  # very large logits
    out = afd_loss(g, t, torch.zeros_like(y), d1, d2, w, b)  # and all labels are the same class
    out.total.backward()
    assert out.total.isfinite() and all(leaf.grad.isfinite().all() for leaf in (g, d1, d2, w, b))


@pytest.mark.parametrize(
    "name, shape", [("teacher_features", (7, 5)), ("labels", (6,)), ("d1_weight", (6, 5)), ("classifier_bias", (3,))]
)
def test_wrong_shapes_are_named(name, shape):
    names = ["features", "teacher_features", "labels", "d1_weight", "d2_weight", "classifier_weight", "classifier_bias"]
    arguments = dict(zip(names, operands(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=name):
        afd_loss(**arguments)


# -- the step in a user's loop -------------------------------------------------------------------------------------


def test_afd_step_in_a_plain_loop_with_a_torchvision_classifier():
    """As in the README: a user's loop and network, uint8 images, no fastafd loader."""
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4)
    model = fastafd.disentangle(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step = fastafd.AFDStep(
        model, net, optimizer, attack=fastafd.PGD(eps="8/255", step_size="4/255", steps=2), gamma=5.0
    )
    assert step.method.gamma == 5.0 and step.method.alpha == find_recipe("released").method.alpha
    x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    y = torch.arange(8) % 4
    before = copy.deepcopy(net.state_dict())
    metrics = [step(x, y) for _ in range(6)]
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics[0].values())
    assert {"loss", "confused", "exclusion", "cross_entropy", "alignment", "adversarial_accuracy"} == set(metrics[0])
    assert metrics[-1]["cross_entropy"] < metrics[0]["cross_entropy"]
    assert all(
        torch.equal(before[name], value) for name, value in net.state_dict().items()
    )  # the teacher does not change
    robust = step.averaged().merge().eval()
    assert type(robust) is type(net)
    torchvision.models.resnet18(num_classes=4).load_state_dict(robust.state_dict())
    images = x.float() / 255
    torch.testing.assert_close(robust(images), step.averaged()(images), atol=1e-5, rtol=1e-5)


def test_first_step_starts_from_the_natural_model():
    """D1 and D2 start as identities: the attacked model is the natural one, and f1 = f2 makes the exclusion loss 0."""
    net = small_net(2).eval()
    model = fastafd.disentangle(net)
    x, y = batches(1)[0]
    torch.testing.assert_close(model.eval()(x), net(x))
    step = fastafd.AFDStep(model, net, make_sgd(model, 0.0, 0.0, 0.0), amp="fp32")
    assert abs(float(step(x, y)["exclusion"])) < 1e-12


def test_attack_leaves_batchnorm_alone_unless_asked():
    net = small_net(2)
    x, y = batches(1)[0]
    for mode, moved in (("eval", False), ("train", True)):
        model = fastafd.disentangle(net)
        step = fastafd.AFDStep(model, net, make_sgd(model, 0.0, 0.0, 0.0), amp="fp32", attack_bn=mode)
        before = model.backbone[1].running_mean.clone()
        step.engine.perturb(x, None, y)
        assert (not torch.equal(before, model.backbone[1].running_mean)) == moved


@pytest.mark.parametrize(
    "fields, words",
    [({"gama": 1.0}, "gamma"), ({"lr": 1.0}, "lr"), ({"recipe": "relased"}, "released"), ({"gamma": -1}, "gamma")],
)
def test_mistakes_name_the_field(fields, words):
    net = small_net(2)
    model = fastafd.disentangle(net)
    with pytest.raises(Exception, match=words):
        fastafd.AFDStep(model, net, make_sgd(model, 0.1, 0.9, 0.0), **fields)


def test_fields_of_the_step_override_the_recipe():
    net = small_net(2)
    model = fastafd.disentangle(net)
    step = fastafd.AFDStep(
        model, net, make_sgd(model, 0.1, 0.9, 0.0), recipe="paper", eps="4/255", steps=3, ema_decay=0.9
    )
    assert (step.attack.eps, step.attack.steps, step.attack.step_size) == (4 / 255, 3, 2 / 255)
    assert step.ema.decay == 0.9 and step.method.beta == 0.25


def test_a_disentangled_teacher_is_copied_not_frozen():
    model = fastafd.disentangle(small_net(2))
    fastafd.AFDStep(model, model, make_sgd(model, 0.1, 0.9, 0.0))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("padding", [0, 1])
def test_uint8_batches_of_either_layout_are_the_same_pixels(padding):
    from fastafd.data import Augment

    net = small_net(2)
    x = torch.randint(0, 256, (4, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for augmented in (False, True):
        seen = []
        for batch in (x, x.permute(0, 3, 1, 2)):
            model = fastafd.disentangle(net)
            augment = Augment(padding, True, seed=1) if augmented else None
            step = fastafd.AFDStep(model, net, make_sgd(model, 0.1, 0.9, 0.0), augment=augment)
            images, _, offsets, flips, *_ = step._inputs(batch, torch.zeros(4))
            seen.append(step._pixels(images, offsets, flips))
        assert torch.equal(*seen) and seen[0].dtype == torch.float64
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
        if not augmented:
            torch.testing.assert_close(seen[0], x.permute(0, 3, 1, 2) / 255.0, check_dtype=False, rtol=1e-6, atol=0)


def test_the_fast_engine_puts_a_network_into_channels_last_and_says_so(capsys):
    """In place, with the optimizer's state and the average. The reference engine does not change the layout."""

    def last(tensor: torch.Tensor) -> bool:
        return tensor.is_contiguous(memory_format=torch.channels_last)

    net = small_net(0)
    model = fastafd.disentangle(net)
    optimizer = make_sgd(model, 0.1, 0.9, 0.0)
    weight = next(p for p in model.parameters() if p.dim() == 4)
    momentum = torch.randn_like(weight)
    optimizer.state[weight]["momentum_buffer"] = momentum
    before = weight.detach().clone()
    fastafd.AFDStep(model, net, optimizer, engine="reference")
    assert not last(weight) and "channels_last" not in capsys.readouterr().err
    step = fastafd.AFDStep(model, net, optimizer, engine="fast", ema_decay=0.9)
    assert capsys.readouterr().err.count("the network's weights are put into channels_last") == 1
    assert weight is next(p for p in model.parameters() if p.dim() == 4)
    assert any(weight is p for group in optimizer.param_groups for p in group["params"])
    assert last(weight) and torch.equal(weight, before)
    kept = optimizer.state[weight]["momentum_buffer"]
    assert last(kept) and torch.equal(kept, momentum)
    assert all(last(p) for p in step.averaged().parameters() if p.dim() == 4)
    fastafd.AFDStep(model, net, optimizer, engine="fast")
    assert "channels_last" not in capsys.readouterr().err
