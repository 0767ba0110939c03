"""The fast engine attacks the user's network with the user's attack, whatever they are, or says what it runs instead.

Every network and attack here trains to the same weights in both engines. The functions run uncompiled, since the
compiler is not what is tested.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from float64 import assert_same
from torch import fx, nn

import fastafd
from fastafd.attacks import KLPGD, PGD, input_gradient
from fastafd.methods import PGDAT, VAFT
from fastafd.models import split
from fastafd.settings import UsageError
from fastafd.training.ema import EMA
from fastafd.training.step import TrainStep

X = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 5


@pytest.fixture(autouse=True)
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def net_of(*tail: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), *tail).double()


def trained(engine, net=None, attack=None, change=None, steps=3, decay=0.5, method=None):
    """The average after some steps; `change` acts on the split network before each step but the first."""
    model = split(net_of() if net is None else copy.deepcopy(net))
    torch.manual_seed(0)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    attack = PGD(steps=2) if attack is None else attack
    step = TrainStep(
        model, sgd, method or VAFT(), attack=attack, amp="fp32", engine=engine, ema_decay=decay, teacher=net_of()
    )
    for index in range(steps):
        if change is not None and index:
            change(model.backbone, index)
        step(X, Y)
    return step


def assert_both_train_alike(**what):
    reference, fast = trained("reference", **what), trained("fast", **what)
    assert_same(fast.model, reference.model, 1e-9)
    assert_same(fast.averaged(), reference.averaged(), 1e-9)
    return fast


# -- networks whose forward is more than its modules --------------------------------------------------------------


def root_pre_hook(net):
    net.register_forward_pre_hook(lambda _, inputs: (1 - inputs[0],))


def hook_on(index):
    def change(net):
        net[index].register_forward_hook(lambda _, inputs, output: output * inputs[0].mean())

    return change


def backward_hook(net):
    net[2].register_full_backward_hook(lambda _, grad_input, grad_output: (grad_input[0] * torch.arange(6.0),))


def replaced_forward(index):
    def change(net):
        plain = type(net[index]).forward
        net[index].forward = lambda x: plain(net[index], x.flip(0))

    return change


def hook_on_the_classifier(model):
    model.classifier.register_forward_hook(lambda _, inputs, output: output * 3)


class Shy(nn.Sequential):
    """Does something else for torch.fx than for images."""

    def forward(self, x):
        return super().forward(x if isinstance(x, fx.Proxy) else 1 - x)


class ShyGradient(nn.Sequential):
    """The same values for torch.fx as for images, and another gradient."""

    def forward(self, x):
        return super().forward(x if isinstance(x, fx.Proxy) else torch.cat([x[:, :1].detach(), x[:, 1:]], 1))


class Stubborn(nn.Sequential):
    """Its second BatchNorm is always in train mode."""

    def train(self, mode=True):
        super().train(mode)
        self[4].train()
        return self


class Pool(nn.AdaptiveAvgPool2d):
    def forward(self, x):
        return super().forward(x).square()


AFTER = {
    "a pre-hook on the network": root_pre_hook,
    "a hook on the last ReLU": hook_on(5),
    "a hook on the pool": hook_on(6),
    "a hook on Flatten": hook_on(7),
    "a hook on a BatchNorm": hook_on(1),
    "a backward hook": backward_hook,
}


@pytest.mark.parametrize("name", AFTER)
def test_hooks_and_replaced_forwards_are_attacked(name):
    model = split(net_of())
    AFTER[name](model.backbone)
    states = {}
    for engine in ("reference", "fast"):
        torch.manual_seed(0)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        before = copy.deepcopy(model.state_dict())
        step = TrainStep(model, sgd, PGDAT(), attack=PGD(steps=2), amp="fp32", engine=engine)
        for _ in range(2):
            step(X, Y)
        states[engine] = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(before)
    for key, value in states["reference"].items():
        torch.testing.assert_close(states["fast"][key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("index", [2, 4, 6])
def test_a_replaced_forward_is_refused(index, engine):
    """The average and the snapshot are copies, in which it would still use the layer that it was made for."""
    model = split(net_of())
    replaced_forward(index)(model.backbone)
    with pytest.raises(ValueError, match=rf"the forward of backbone\.{index} \(\w+\) was replaced"):
        TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), PGDAT(), attack=PGD(), amp="fp32", engine=engine)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_a_hook_that_reads_the_model_itself_is_refused(engine):
    model = split(net_of())
    first = model.backbone[0]
    model.backbone[3].register_forward_hook(lambda _, inputs, output: output * first.weight.mean())
    with pytest.raises(ValueError, match=r"reads its backbone\.0"):
        TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), PGDAT(), attack=PGD(), amp="fp32", engine=engine)


@pytest.mark.parametrize("kind", [Shy, ShyGradient, Stubborn])
def test_a_network_that_its_trace_does_not_show_is_attacked_itself(kind, capsys):
    fast = assert_both_train_alike(net=kind(*net_of()))
    what = "gradients" if kind is ShyGradient else "logits"
    assert f"the attack runs uncompiled, on the model itself: a snapshot of it has other {what}" in (
        capsys.readouterr().err
    )
    assert fast.engine.snapshot is None


def test_hooks_on_the_last_layer_and_on_the_whole(capsys):
    """They are registered after the first step; a network that has them before is refused."""
    for change in (hook_on_the_classifier, lambda model: model.register_forward_hook(lambda _, x, z: z.roll(1, 1))):
        trained_by = {}
        for engine in ("reference", "fast"):
            model = split(net_of())
            sgd = torch.optim.SGD(model.parameters(), 0.1)
            step = TrainStep(model, sgd, PGDAT(), attack=PGD(steps=2), amp="fp32", engine=engine)
            step(X, Y)
            change(model)
            for _ in range(2):
                step(X, Y)
            trained_by[engine] = model
        assert_same(trained_by["fast"], trained_by["reference"], 1e-9)
        assert "has other logits" in capsys.readouterr().err


def test_a_pool_of_ones_own():
    net = net_of()
    net[6] = Pool(1)
    assert_both_train_alike(net=net)


def test_an_ordinary_network_is_attacked_on_its_snapshot(capsys):
    fast = assert_both_train_alike()
    assert fast.engine.itself is None and "itself" not in capsys.readouterr().err


def test_a_teacher_that_its_trace_does_not_show(capsys):
    trained_by = {}
    for engine in ("reference", "fast"):
        torch.manual_seed(0)
        model = fastafd.disentangle(net_of())
        sgd = fastafd.make_sgd(model, 0.1, 0.9, 0.0)
        step = fastafd.AFDStep(model, Shy(*net_of()), sgd, engine=engine, amp="fp32", steps=1)
        step(X, Y)
        trained_by[engine] = step.model
    assert_same(trained_by["fast"], trained_by["reference"], 1e-9)
    assert "the teacher's features are computed by the network itself" in capsys.readouterr().err


# -- networks that change between steps ---------------------------------------------------------------------------


class Scaled(nn.Sequential):
    factor = 1.0

    def forward(self, x):
        return super().forward(x * self.factor)


class Running(nn.Sequential):
    """Replaces its buffer in each forward in train mode."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.shift = 0.5 * self.shift + 0.5 * x.detach().mean()
        return super().forward(x - self.shift)


class Remembers(nn.Sequential):
    """Keeps its last features, and counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        for layer in list(self)[:-1]:
            self.last = layer(self.last)
        return self[-1](self.last)


def set_factor(net, index):
    net.factor = 1.0 + index


def replace_weight(net, index):
    with torch.no_grad():
        net[1].running_mean = net[1].running_mean + 1.0


def add_hook(net, index):
    if index == 1:
        net[0].register_forward_hook(lambda _, inputs, output: output * 3)


def set_constant(net, index):
    net.constant.fill_(index)


class Held(nn.Sequential):
    """Reads numbers and tensors that it keeps in containers and objects."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.config, self.memory = {"factor": 1.0}, [torch.ones((), dtype=torch.float64)]
        self.options = SimpleNamespace(shift=0.0)

    def forward(self, x):
        return super().forward(x * self.config["factor"] * self.memory[0] + self.options.shift)


def set_in_a_dict(net, index):
    net.config["factor"] = 1.0 + index


def set_in_a_list(net, index):
    net.memory[0].add_(index)


def set_in_an_object(net, index):
    net.options.shift = 0.1 * index


class Tanh(nn.ReLU):
    def forward(self, x):
        return x.tanh()


def set_class(net, index):
    net[2].__class__ = Tanh


def wrap_a_layer(net, index):
    if index == 1:
        net[0] = nn.Sequential(net[0])


def replace_activation(net, index):
    net[2] = nn.Tanh()


def without_statistics(net, index):
    net[1].running_mean = net[1].running_var = None
    net[1].track_running_stats = False


class InPlace(Running):
    """Changes its buffer in place, and reads what it computes from it."""

    def forward(self, x):
        if self.training:
            self.shift.mul_(0.5).add_(0.5 * x.detach().mean())
        return nn.Sequential.forward(self, x * (1 + self.shift))


class Constant(nn.Sequential):
    """Reads a tensor that is no buffer."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.constant = torch.zeros((), dtype=torch.float64)

    def forward(self, x):
        return super().forward(x * (1 + self.constant))


@pytest.mark.parametrize(
    "kind, change",
    [
        (Scaled, set_factor),
        (Running, None),
        (InPlace, None),
        (Remembers, None),
        (nn.Sequential, replace_weight),
        (nn.Sequential, add_hook),
        (Constant, set_constant),
        (Held, set_in_a_dict),
        (Held, set_in_a_list),
        (Held, set_in_an_object),
        (nn.Sequential, set_class),
        (nn.Sequential, replace_activation),
        (nn.Sequential, without_statistics),
    ],
)
def test_what_a_network_changes_between_steps_is_seen(kind, change):
    fast = assert_both_train_alike(net=kind(*net_of()), change=change)
    if change is not None:
        with pytest.raises(AssertionError):  # the change matters
            assert_same(fast.model, trained("reference", net=kind(*net_of())).model, 1e-9)
    assert_same(
        trained("fast", net=kind(*net_of()), change=change, decay=0.0).averaged(),
        trained("reference", net=kind(*net_of()), change=change, decay=0.0).averaged(),
        1e-9,
    )


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_the_average_has_what_the_model_has(engine):
    """Buffers that were replaced are averaged, and plain attributes are the model's."""
    step = trained(engine, net=Running(*net_of()))
    assert 0 < step.averaged().backbone.shift < 0.5 and step.averaged().backbone.shift != step.model.backbone.shift
    scaled = trained(engine, net=Scaled(*net_of()), change=set_factor)
    assert scaled.averaged().backbone.factor == 3.0


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_the_average_of_a_model_with_a_layer_wrapped_later(engine):
    step = trained(engine, change=wrap_a_layer)
    plain = trained(engine)
    assert torch.equal(step.averaged().backbone[0][0].bias, step.ema.module.backbone[0][0].bias)
    assert len(list(step.averaged().parameters())) == len(list(plain.averaged().parameters()))


def test_complex_buffers_are_averaged():
    net = nn.Linear(2, 2)
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    ema = EMA(net, 0.5)
    net.phase.fill_(4 + 4j)
    ema.move(0.25)
    assert torch.equal(ema.module.phase, torch.full((2,), 1 + 1j))


@pytest.mark.parametrize("first, second", [("fast", "reference"), ("reference", "fast"), ("fast", "fast")])
def test_a_state_of_one_engine_continues_in_the_other(first, second):
    """The fast engine's momentum is channels_last and its SGD fused; PyTorch's fused SGD ignores strides."""

    def step(engine):
        model = split(net_of())
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return TrainStep(model, sgd, PGDAT(), attack=PGD(steps=1), amp="fp32", engine=engine, ema_decay=0.5)

    whole, begun, resumed = step("reference"), step(first), step(second)
    for _ in range(2):
        whole(X, Y)
        begun(X, Y)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    for _ in range(2):
        whole(X, Y)
        resumed(X, Y)
    assert_same(resumed.model, whole.model, 1e-9)


@pytest.mark.parametrize("how", ["weights", "model", "state"])
def test_a_layout_that_changes_between_steps(how):
    models = []
    for engine in ("reference", "fast"):
        model = split(net_of())
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step = TrainStep(model, sgd, PGDAT(), attack=PGD(steps=1), amp="fp32", engine=engine)
        for index in range(3):
            step(X, Y)
            if index == 0 and how == "weights":
                for p in model.parameters():
                    p.data = p.data.clone(memory_format=torch.contiguous_format)
            elif index == 0 and how == "model":
                model.to(memory_format=torch.contiguous_format)
            elif index == 0:
                for values in sgd.state.values():
                    values["momentum_buffer"] = values["momentum_buffer"].clone(memory_format=torch.contiguous_format)
        models.append(model)
    assert_same(models[1], models[0], 1e-9)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_a_weight_replaced_between_steps_must_be_in_the_optimizer(engine):
    def change(net, index):
        net[0].weight = nn.Parameter(net[0].weight.detach().clone())

    with pytest.raises(ValueError, match=r"backbone\.0\.weight|optimizer"):
        trained(engine, change=change)


def test_a_check_leaves_no_trace():
    """The comparison of the first batch changes no statistics and draws no numbers of the run."""
    model = split(Stubborn(*net_of()))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep(model, sgd, PGDAT(), attack=PGD(steps=1), amp="fp32", engine="fast")
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    step._check_networks(X, Y)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# -- attacks ------------------------------------------------------------------------------------------------------


class Features(PGD):
    """Reads the features of the network, and puts it into eval mode itself."""

    def ascent(self, classifier, x, y):
        classifier.eval()
        clean = classifier.features(x).detach()
        return lambda v: torch.autograd.grad((classifier.features(v) - clean + 0.1).norm(), v)[0]


class InTrainMode(PGD):
    def ascent(self, classifier, x, y):
        classifier.train()
        return lambda v: -input_gradient(classifier, v, y)


class OfACopy(PGD):
    def ascent(self, classifier, x, y):
        other = copy.deepcopy(classifier)
        return lambda v: -input_gradient(other, v, y)


class MovedWeights(PGD):
    """As adversarial weight perturbation does."""

    def ascent(self, classifier, x, y):
        def gradient(v):
            with torch.no_grad():
                classifier.classifier.weight.neg_()
            grad = input_gradient(classifier, v, y)
            with torch.no_grad():
                classifier.classifier.weight.neg_()
            return grad

        return gradient


class OwnClimb(PGD):
    def climb(self, gradient, x, noise):
        return super().climb(lambda v: -gradient(v), x, noise)


class Margin(PGD):
    """A loss that is not the same for logits and log-probabilities."""

    def ascent(self, classifier, x, y):
        return lambda v: torch.autograd.grad(classifier(v).square().sum(), v)[0]


class Heavy(PGD):
    """Weights of the classes that do not sum to 1."""

    def target(self, logits, y):
        return F.one_hot(y, 5).double() * 3 + logits().detach().softmax(1) * 0.5 - 0.2


class Some(PGD):
    """Leaves every other image out."""

    def target(self, logits, y):
        return torch.where(torch.arange(len(y)) % 2 == 0, y, -100)


class Likeliest(PGD):
    def target(self, logits, y):
        return logits().argmax(1)


def on_the_object():
    attack = PGD(steps=2)
    object.__setattr__(attack, "ascent", lambda classifier, x, y: lambda v: -input_gradient(classifier, v, y))
    return attack


@pytest.mark.parametrize("tail", ["logits", "log_softmax"])
@pytest.mark.parametrize(
    "kind", [Features, InTrainMode, OfACopy, MovedWeights, OwnClimb, Margin, Heavy, Some, Likeliest, KLPGD, "object"]
)
def test_an_attack_of_ones_own_is_climbed_as_it_is(kind, tail):
    net = net_of(*[nn.LogSoftmax(1)] * (tail == "log_softmax"))
    attack = on_the_object() if kind == "object" else kind(steps=2)
    fast = assert_both_train_alike(net=net, attack=attack, method=PGDAT())
    with pytest.raises(AssertionError):
        assert_same(fast.model, trained("reference", net=net, method=PGDAT()).model, 1e-9)


class Odd(PGD):
    returned = None

    def target(self, logits, y):
        return type(self).returned


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize(
    "value, says",
    [
        (Y + 3, "labels 3 to 7, takes class numbers"),
        (None, "a NoneType"),
        (torch.rand(8, 4), r"float32 \(8, 4\)"),
        (Y[:3], r"int64 \(3,\)"),
        (torch.full((8, 5), float("nan")), "not finite"),
    ],
)
def test_a_target_that_cannot_be_climbed_is_refused(engine, value, says):
    Odd.returned = value
    with pytest.raises(UsageError, match=f"attack: target of Odd returns .*{says}"):
        trained(engine, attack=Odd(steps=1))


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("name", ["perturb", "__call__"])
def test_an_attack_whose_whole_call_is_its_own_is_refused(engine, name):
    kind = type("Whole", (PGD,), {name: lambda self, classifier, x, y, generator=None: x})
    with pytest.raises(UsageError, match="Whole has its own __call__"):
        trained(engine, attack=kind(steps=1))
    if name == "perturb":
        attack = PGD(steps=1)
        object.__setattr__(attack, "perturb", lambda *_: X)
        with pytest.raises(UsageError, match="PGD has its own __call__"):
            trained(engine, attack=attack)


class Weighted(PGD):
    """An __init__ of its own, and an attribute that is no field."""

    def __init__(self, weight, **fields):
        super().__init__(**fields)
        object.__setattr__(self, "weight", weight)


@dataclass(frozen=True)
class Longer(PGD):
    extra: int = 3


def test_fields_of_an_attack_of_ones_own():
    model = fastafd.disentangle(net_of())

    def step(attack, **fields):
        sgd = fastafd.make_sgd(model, 0.1, 0.9, 0.0)
        return fastafd.AFDStep(model, net_of(), sgd, attack=attack, engine="reference", amp="fp32", **fields)

    with pytest.raises(UsageError, match="eps: pass it to Weighted, not to AFDStep"):
        step(Weighted(2.0, steps=1), eps="4/255")
    assert step(Weighted(2.0, steps=1)).attack.weight == 2.0
    changed = step(Longer(steps=1, extra=7), eps="4/255").attack
    assert changed == Longer(steps=1, extra=7, eps=4 / 255)


def test_an_attack_that_reads_features_runs_alone_too():
    model = split(net_of()).eval()
    attack = Features(steps=2)
    x_adv = attack(model, X, Y, torch.Generator().manual_seed(0))
    assert not torch.equal(x_adv, X)


# -- networks and optimizers that no step can use -----------------------------------------------------------------


def test_a_network_without_values_is_refused():
    images = fastafd.data.ArraySplit(np.zeros((8, 8, 8, 3), np.uint8), Y.numpy())
    with torch.device("meta"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ValueError, match="is on the meta device, without values"):
        fastafd.disentangle(net, example=X.float())
    model = fastafd.disentangle(net)  # values may be loaded later
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    step = lambda: fastafd.AFDStep(model, net_of(), sgd, engine="reference", amp="fp32")  # noqa: E731
    for use in (step, lambda: PGD()(net, X, Y), lambda: fastafd.evaluate(net, images, "clean")):
        with pytest.raises(UsageError, match="meta"):
            use()


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused():
    model = fastafd.disentangle(net_of())
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times a step"):
        fastafd.AFDStep(model, net_of(), torch.optim.LBFGS(model.parameters()), engine="reference", amp="fp32")
    fastafd.AFDStep(model, net_of(), torch.optim.AdamW(model.parameters()), engine="reference", amp="fp32")
