"""`disentangle` and `split` take a network as it computes, or refuse it by naming the layer; they never change it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastafd
from fastafd.models import split

IMAGES = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


class Net(nn.Module):
    """A small classifier whose forward is `ends(self, features)`; `layers` are registered in their order."""

    def __init__(self, ends, **layers):
        super().__init__()
        self.ends = ends
        for name in [name for name in layers if name.startswith("early")]:
            self.add_module(name, layers[name])
        convolution = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.body = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for name in [name for name in layers if not name.startswith("early")]:
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.ends(self, self.body(x))


class Untraceable(Net):
    def forward(self, x):
        if x.mean() > -1:  # torch.fx cannot decide that
            return super().forward(x)
        return x


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


class Plain(nn.Linear):
    """A subclass without a forward of its own."""


def fc(classes=4, features=8):
    return nn.Linear(features, classes)


def hooked(kind):
    layer = fc()
    if kind == "old":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.utils.weight_norm(layer)
    if kind == "new":
        return nn.utils.parametrizations.spectral_norm(layer)
    layer.register_forward_hook(lambda module, inputs, output: output / 2)
    return layer


def in_place(net, features):
    logits = net.fc(features)
    logits.div_(3)
    return logits


def in_train_mode(change):
    """Ends that change the logits in place, in train mode alone."""

    def ends(net, features):
        logits = net.fc(features)
        if net.training:
            change(logits)
        return logits

    return ends


def listed(kind):
    """The layers are called from a list, in which they cannot be exchanged. C equals D."""
    net = kind(lambda s, f: s.stages[0](f), fc=fc(8))
    net.stages = [net.fc]
    return net


def zeros(kind):
    net = kind(lambda s, f: s.fc(f) / 0.1 if isinstance(f, torch.Tensor) else s.fc(f), fc=fc())
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    return net


def two_names():
    net = Net(lambda s, f: s.fc(f), fc=fc())
    net.head = net.fc
    return net


def tied():
    net = Net(lambda s, f: s.fc(f) if True else s.proto(f), fc=fc(), proto=fc())
    net.proto.weight = net.fc.weight
    return net


TAKEN = {
    "a spare layer last": lambda kind: kind(lambda s, f: s.fc(f), fc=fc(), spare=fc(7, 3)),
    "registered first": lambda kind: kind(lambda s, f: s.early(s.late(f)), early=fc(4, 5), late=fc(5)),
    "Identity behind it": lambda kind: kind(lambda s, f: s.end(s.fc(f)), fc=fc(), end=nn.Identity()),
    "log_softmax behind it": lambda kind: kind(lambda s, f: F.log_softmax(s.fc(f), -1), fc=fc()),
    "a LogSoftmax layer": lambda kind: kind(lambda s, f: s.end(s.fc(f)), fc=fc(), end=nn.LogSoftmax(1)),
    "the method log_softmax": lambda kind: kind(lambda s, f: s.fc(f).log_softmax(dim=1), fc=fc()),
    "a plain subclass": lambda kind: kind(lambda s, f: s.fc(f), fc=Plain(8, 4)),
    "no bias": lambda kind: kind(lambda s, f: s.fc(f), fc=nn.Linear(8, 4, bias=False)),
    "its widths read": lambda kind: kind(lambda s, f: s.fc(f.view(-1, s.fc.in_features)), fc=fc()),
    "called with a keyword": lambda kind: kind(lambda s, f: s.fc(input=f).log_softmax(1), fc=fc()),
    "a view behind it": lambda kind: kind(lambda s, f: s.fc(f).view(len(f), -1), fc=fc()),
    "dropout before it": lambda kind: kind(lambda s, f: s.fc(F.dropout(f, 0.3, s.training)), fc=fc()),
}
REFUSED = {  # the network, what the message says
    "softmax": (lambda kind: kind(lambda s, f: s.fc(f).softmax(1), fc=fc()), "fc"),
    "Softmax layer": (lambda kind: kind(lambda s, f: s.end(s.fc(f)), fc=fc(), end=nn.Softmax(1)), "fc"),
    "sigmoid": (lambda kind: kind(lambda s, f: torch.sigmoid(s.fc(f)), fc=fc()), "fc"),
    "temperature": (lambda kind: kind(lambda s, f: s.fc(f) / 0.07, fc=fc()), "fc"),
    "scaling in place": (lambda kind: kind(in_place, fc=fc()), "fc"),
    "normalised logits": (lambda kind: kind(lambda s, f: F.normalize(s.fc(f)), fc=fc()), "fc"),
    "log_softmax over the batch": (lambda kind: kind(lambda s, f: s.fc(f).log_softmax(0), fc=fc()), "fc"),
    "used twice": (lambda kind: kind(lambda s, f: s.fc(s.fc(f).relu()), fc=fc(8)), "fc is called 2 times"),
    "a forward of its own": (lambda kind: kind(lambda s, f: s.fc(f), fc=Cosine(8, 4)), r"fc \(Cosine\)|Cosine"),
    "two heads": (lambda kind: kind(lambda s, f: (s.fc(f), s.aux(f)), fc=fc(), aux=fc()), "tuple of 2"),
    "a dict": (lambda kind: kind(lambda s, f: {"logits": s.fc(f)}, fc=fc()), "dict of 1"),
    "the sum of two heads": (lambda kind: kind(lambda s, f: s.a(f) + s.b(f), a=fc(), b=fc()), r"[ab]\b"),
    "an output of its own in train mode": (
        lambda kind: kind(lambda s, f: (s.fc(f), f) if s.training else s.fc(f), fc=fc()), "in train mode.*tuple of 2"),
    "another layer in train mode": (
        lambda kind: kind(lambda s, f: s.a(f) if s.training else s.b(f), a=fc(), b=fc()), "train mode"),
    "the functional form": (lambda kind: kind(lambda s, f: F.linear(f, s.fc.weight), fc=fc()), "linear|nn.Linear"),
    "its weight read elsewhere": (
        lambda kind: kind(lambda s, f: s.fc(f + s.fc.weight.sum()), fc=fc()), "fc"),
    "no Linear": (lambda kind: kind(lambda s, f: f, other=nn.Identity()), "Flatten|no nn.Linear|not that of"),
    "weight_norm": (lambda kind: kind(lambda s, f: s.fc(f), fc=hooked("old")), "fc"),
    "spectral_norm": (lambda kind: kind(lambda s, f: s.fc(f), fc=hooked("new")), "fc"),
    "a hook": (lambda kind: kind(lambda s, f: s.fc(f), fc=hooked("hook")), "fc has hooks"),
    "two names": (lambda kind: two_names(), "fc and head"),
    "a tied weight": (lambda kind: tied(), "fc.weight and proto.weight"),
    "LazyLinear": (lambda kind: kind(lambda s, f: s.fc(f), fc=nn.LazyLinear(4)), "LazyLinear|fc"),
    "one class": (lambda kind: kind(lambda s, f: s.fc(f), fc=fc(1)), "fc has 1 output"),
    "its bias read": (lambda kind: kind(lambda s, f: s.fc(f) if s.fc.bias is not None else f, fc=fc()), "fc|bias"),
    "log_softmax in another type": (
        lambda kind: kind(lambda s, f: s.fc(f).log_softmax(1, torch.float64), fc=fc()), "fc"),
    "a temperature for tensors alone": (
        lambda kind: kind(lambda s, f: s.fc(f) / 0.1 if isinstance(f, torch.Tensor) else s.fc(f), fc=fc()), "fc"),
    "softmax without gradients": (
        lambda kind: kind(lambda s, f: s.fc(f) if torch.is_grad_enabled() else s.fc(f).softmax(1), fc=fc()), "fc"),
    "softmax with gradients": (
        lambda kind: kind(lambda s, f: s.fc(f).softmax(1) if torch.is_grad_enabled() else s.fc(f), fc=fc()), "fc"),
    "scaling in place in train mode": (
        lambda kind: kind(in_train_mode(lambda logits: logits.div_(0.1)), fc=fc()), "in train mode.*fc"),
    "a class set in train mode": (
        lambda kind: kind(in_train_mode(lambda logits: logits[:, 0].fill_(-1e4)), fc=fc()), "in train mode.*fc"),
    "a list of layers": (listed, "fc"),
    "a temperature behind zeros": (zeros, "fc"),
}  # fmt: skip


def moved(model):
    generator = torch.Generator().manual_seed(1)
    for weight in (model.d1.weight, model.classifier.weight):
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", [Net, Untraceable], ids=["traced", "run"])
@pytest.mark.parametrize("name", TAKEN)
def test_the_forward_decides_which_layer_is_the_last(name, kind):
    torch.manual_seed(0)
    net = TAKEN[name](kind).eval()
    before = copy.deepcopy(net.state_dict())
    model = fastafd.disentangle(net, example=IMAGES)
    assert model.proven
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES), net(IMAGES))
        model = moved(model)
        merged = model.merge()
        torch.testing.assert_close(merged(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)
    net.load_state_dict(merged.state_dict(), strict=True)
    assert before.keys() == merged.state_dict().keys()


@pytest.mark.parametrize("kind", [Net, Untraceable], ids=["traced", "run"])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [fastafd.disentangle, split])
def test_another_function_is_refused_by_naming_the_layer(name, kind, function):
    build, says = REFUSED[name]
    with pytest.raises(ValueError, match=says) as raised:
        function(build(kind), example=IMAGES)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a spare layer last", "registered first"])
def test_a_network_that_cannot_be_traced_takes_the_named_layer(name):
    net = TAKEN[name](Untraceable)
    layer = "early" if name == "registered first" else "fc"
    model = fastafd.disentangle(net, classifier=layer)
    assert (model.linear_name, model.proven) == (layer, False)
    step = fastafd.AFDStep(model, net, fastafd.make_sgd(model, 0.1, 0.9, 0.0), steps=1)
    step(IMAGES, LABELS)  # checks the model and the teacher
    assert model.proven


UNTRACEABLE = ["softmax", "temperature", "used twice", "two heads", "its weight read elsewhere"]
DECEIVING = [  # a trace finds nothing wrong with these
    "scaling in place", "log_softmax in another type", "a temperature for tensors alone", "softmax without gradients",
    "scaling in place in train mode", "a class set in train mode", "a list of layers", "a temperature behind zeros",
]  # fmt: skip


@pytest.mark.parametrize(
    "name, kind", [*((name, Untraceable) for name in UNTRACEABLE), *((name, Net) for name in DECEIVING)]
)
def test_the_first_batch_decides_where_nothing_else_does(name, kind):
    build, _ = REFUSED[name]
    net = build(kind)
    model = fastafd.disentangle(net)
    assert not model.proven
    step = fastafd.AFDStep(model, net, fastafd.make_sgd(model, 0.1, 0.9, 0.0), steps=1)
    with pytest.raises(ValueError, match="disentangle") as raised:
        step(IMAGES, LABELS.clamp(max=2))
    assert "\n" not in str(raised.value)


def test_the_check_leaves_the_model_and_the_images_as_they_are():
    def ends(net, features):
        net.kept = features  # with a history it could not be copied
        return net.fc(features)

    net = Net(ends, fc=fc())
    net.body.register_forward_pre_hook(lambda module, inputs: (inputs[0].sub_(0.5),))
    x = IMAGES.clone()
    model = fastafd.disentangle(net, example=x)
    assert torch.equal(x, IMAGES) and model.training
    trained = model.merge().state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())


def test_other_arguments_have_their_defaults():
    class Optional(Net):
        def forward(self, x, temperature=None, labels=None):
            logits = super().forward(x)
            logits = logits if labels is None else logits - labels
            return logits if temperature is None else logits / temperature

    assert fastafd.disentangle(Optional(lambda s, f: s.fc(f), fc=fc())).linear_name == "fc"


def test_a_hook_on_the_network_itself_is_seen():
    net = Net(lambda s, f: s.fc(f), fc=fc())
    net.register_forward_hook(lambda module, inputs, output: output.softmax(1))
    with pytest.raises(ValueError, match=r"softmax.*fc"):
        fastafd.disentangle(net)


def patched(layer):
    """A network in which the forward of a layer was replaced by a function that holds that layer."""
    net = Net(lambda s, f: s.fc(f), fc=fc())
    module = net.get_submodule(layer)
    forward = module.forward
    module.forward = lambda x: forward(x) / 0.1
    return net


def with_hook(hook):
    net = Net(lambda s, f: s.fc(f), fc=fc(), side=fc(8))
    hook(net)
    return net


def own_call():
    class Called(Net):
        def __call__(self, x):
            return super().__call__((x - 0.5) / 0.2)

    return Called(lambda s, f: s.fc(f), fc=fc())


SHARED = {  # a copy that would use the network it was made from; what the message says
    "the network's forward": (lambda: patched(""), "the forward of the network itself was replaced"),
    "the body's forward": (lambda: patched("body"), r"the forward of body \(Sequential\) was replaced"),
    "the layer's forward": (lambda: patched("fc"), r"the forward of fc \(Linear\) was replaced"),
    "a call of its own": (own_call, "Called has a __call__ of its own"),
    "a function that holds a layer": (
        lambda: with_hook(lambda net: setattr(net, "ends", lambda s, f: net.fc(f))), "reads the network"),
    "a hook that holds a layer": (
        lambda: with_hook(lambda net: net.body.register_forward_hook(lambda m, i, o, side=net.side: side(o))),
        r"body \(Sequential\), such as a hook, reads its side"),
    "a hook that holds a weight": (
        lambda: with_hook(lambda net: net.body.register_forward_hook(lambda m, i, o, w=[net.side.bias]: o + w[0])),
        r"reads its side\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_a_copy_that_would_use_the_original_is_refused(name):
    build, says = SHARED[name]
    with pytest.raises(ValueError, match=says) as raised:
        fastafd.disentangle(build())
    assert "\n" not in str(raised.value)


def test_hooks_that_hold_nothing_stay():
    net = with_hook(lambda net: net.body.register_forward_hook(lambda m, i, o: o * 2))
    model = fastafd.disentangle(net, example=IMAGES).eval()
    torch.testing.assert_close(model(IMAGES), net.eval()(IMAGES))


def test_a_name_that_is_no_linear_layer_is_refused():
    net = Net(lambda s, f: s.fc(f), fc=fc(), spare=fc(3, 2))
    with pytest.raises(ValueError, match=r"no layer of that name.*fc, spare"):
        fastafd.disentangle(net, classifier="head")
    with pytest.raises(ValueError, match=r"body.*Sequential"):
        fastafd.disentangle(net, classifier="body")
    with pytest.raises(ValueError, match="fc computes its output, not spare"):
        fastafd.disentangle(net, classifier="spare")
    assert fastafd.disentangle(net, classifier="fc").linear_name == "fc"


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "a compiled part": lambda net: nn.Sequential(nn.Identity(), torch.compile(net)),
    "compiled in place": lambda net: (net.compile(), net)[1],
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name):
    net = Net(lambda s, f: s.fc(f), fc=fc()).eval()
    with torch.no_grad():
        expected = net(IMAGES)
    model = fastafd.disentangle(WRAPPERS[name](net)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected)
    assert not any("module." in key or "_orig_mod" in key for key in model.merge().state_dict())


class Normalised(nn.DataParallel):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.2)


class Renamed(nn.DataParallel):
    """A subclass that does nothing else."""


class Averaged(torch.optim.swa_utils.AveragedModel):
    def forward(self, x):
        return super().forward(x) / 0.1


def hooked_wrapper(net):
    wrapper = nn.DataParallel(net)
    wrapper.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 0.5) / 0.2,))
    return wrapper


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrapper", [Normalised, Averaged, hooked_wrapper])
def test_wrappers_that_do_something_are_refused(wrapper, inside):
    net = wrapper(Net(lambda s, f: s.fc(f), fc=fc()))
    with pytest.raises(ValueError, match=r"forward of its own around its module|has hooks"):
        fastafd.disentangle(nn.Sequential(nn.Identity(), net) if inside else net)
    assert split(Renamed(Net(lambda s, f: s.fc(f), fc=fc()))).linear_name == "fc"


def test_a_forward_that_reads_an_inner_wrapper_is_refused_in_one_line():
    net = Net(lambda s, f: s.fc(s.inner.module(f)), fc=fc(), inner=nn.DataParallel(nn.Identity()))
    with pytest.raises(ValueError, match=r"its copy fails .*module") as raised:
        fastafd.disentangle(net, example=IMAGES)
    assert "\n" not in str(raised.value)


def test_distributed_wrappers_are_taken_off(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net = Net(lambda s, f: s.fc(f), fc=fc()).eval()
        model = fastafd.disentangle(nn.parallel.DistributedDataParallel(net)).eval()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(model(IMAGES), net(IMAGES))


def test_a_script_is_refused_by_name():
    scripted = torch.jit.trace(Net(lambda s, f: s.fc(f), fc=fc()).eval(), IMAGES)
    with pytest.raises(ValueError, match="script"):
        fastafd.disentangle(scripted)


def test_what_a_forward_keeps_does_not_matter():
    """The trace runs on a copy, and a network that keeps a result cannot be copied: one line says so."""

    def keep(net, features):
        net.kept = features
        return net.fc(features)

    net = Net(keep, fc=fc())
    assert fastafd.disentangle(net).linear_name == "fc"
    assert not hasattr(net, "kept")
    net(IMAGES)
    with pytest.raises(ValueError, match="cannot be copied"):
        fastafd.disentangle(net)


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.slow
def test_log_probabilities_train_like_logits(engine):
    """The step of a network that ends in log_softmax is the step of the network without it."""
    results = []
    for end in (nn.Identity(), nn.LogSoftmax(1)):
        torch.manual_seed(0)
        net = Net(lambda s, f: s.end(s.fc(f)), fc=fc(), end=end).double()
        model = fastafd.disentangle(net)
        step = fastafd.AFDStep(model, net, fastafd.make_sgd(model, 0.1, 0.9, 0.0), steps=2, engine=engine, amp="fp32")
        for _ in range(3):
            step(IMAGES.double(), LABELS)
        results.append(step.averaged().merge())
    with torch.no_grad():
        logits, logs = (net.eval()(IMAGES.double()) for net in results)
    torch.testing.assert_close(logs, logits.log_softmax(1), atol=1e-9, rtol=1e-9)


def test_inference_mode_makes_a_model_that_trains():
    net = Net(lambda s, f: s.fc(f), fc=fc())
    with torch.inference_mode():
        model = fastafd.disentangle(net)
        again = fastafd.disentangle(model.merge())
    for derived in (model, again):
        step = fastafd.AFDStep(derived, net, fastafd.make_sgd(derived, 0.1, 0.9, 0.0), steps=1)
        step(IMAGES, LABELS)
