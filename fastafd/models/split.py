"""A classifier in two parts: the backbone, which ends in pooled features, and the last linear layer."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.models.logits import copied, find_logits_layer, noted, on_device, refusal, run, same
from fastafd.models.modes import eval_mode, examined, wholly_eval


class Tap(nn.Module):
    """Keeps its input (B,D), which it returns."""

    value: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        self.value = input
        return input


class Tapped(nn.Module):
    """The features of a network in whose forward something stands behind the last linear layer. `tap` is in its place.

    net: contains `tap`. The forward returns what `tap` gets.
    """

    def __init__(self, net: nn.Module, tap: Tap):
        super().__init__()
        self.net = net
        self.tap = tap

    def forward(self, x: Tensor) -> Tensor:
        self.net(x)
        features, self.tap.value = self.tap.value, None  # a tensor with a history could not be copied
        assert features is not None
        return features


class SplitNet(nn.Module):
    """A classifier in two parts, `backbone` (pooled features g) and `classifier`. `split` makes it.

    log_softmax: True if the source returns log-probabilities, and so does this model's forward.
    proven: True once `check_split` has compared it with its source on images; a step does so with its first batch.
    """

    log_softmax: bool = False
    proven: bool = False

    def __init__(self, backbone: nn.Module, linear_name: str, classifier: nn.Linear):
        super().__init__()
        self.backbone = backbone
        self.linear_name = linear_name
        self.classifier = classifier

    def features(self, x: Tensor) -> Tensor:
        """The pooled features g(x) (B,D) of images (B,3,H,W)."""
        return self.backbone(x)

    def f1(self, x: Tensor) -> Tensor:
        """The features (B,D) that the classifier reads, here g(x), of images (B,3,H,W)."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B,C) of images (B,3,H,W); their log_softmax if the source returns that."""
        logits: Tensor = self.classifier(self.f1(x))
        return logits.log_softmax(1) if self.log_softmax else logits

    def merge(self) -> nn.Module:
        """A new plain classifier. It shares no memory with this model; modes and requires_grad are this model's."""
        return self._whole(self.classifier.weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _whole(self, weight: Tensor) -> nn.Module:
        """A copy in the original architecture, with `weight` (C,D) in its last layer."""
        net = copy.deepcopy(self.backbone)
        net = net.net if isinstance(net, Tapped) else net
        linear = copy.deepcopy(self.classifier)
        linear.weight.copy_(weight)
        net.set_submodule(self.linear_name, linear)
        return net


Halves = TypeVar("Halves", bound=SplitNet)


def split(
    net: nn.Module,
    into: type[Halves] = SplitNet,  # type: ignore[assignment]
    *,
    classifier: str | None = None,
    example: Tensor | None = None,
) -> Halves:
    """A copy of `net` as backbone and classifier, wholly in train mode if `net` is in eval mode.

    net: any classifier whose output is that of one nn.Linear, such as those of `fastafd.models`, torchvision and timm;
    DataParallel, DistributedDataParallel and torch.compile around it are taken off. classifier: the name of that layer.
    example: images (B,3,H,W) to find it by, where torch.fx cannot trace `net`, and to compare both networks on. Without
    them they are compared at the first batch of a step.
    Raises ValueError, which names the layer and the reason, if something else computes the output.
    """
    net = copied(net)
    if example is not None and any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers())):
        raise ValueError(f"{type(net).__name__} is on the meta device, without values; load weights into it first")
    if isinstance(net, SplitNet):
        raise ValueError("the network is already split or disentangled; call merge() first")
    layer = find_logits_layer(net, classifier, example)
    linear = net.get_submodule(layer.name)
    assert isinstance(linear, nn.Linear)
    in_eval = wholly_eval(net)
    tap = (Tap() if layer.log_softmax else nn.Identity()).train(linear.training)
    vars(tap).update(in_features=linear.in_features, out_features=linear.out_features)  # a forward may read them
    net.set_submodule(layer.name, tap)
    backbone = Tapped(net, tap) if isinstance(tap, Tap) else net
    with torch.inference_mode(False):
        halves = into(backbone, layer.name, linear)
    if in_eval:
        halves.train()
    halves.log_softmax = layer.log_softmax
    if example is not None:
        check_split(halves, example)
    return halves


@torch.inference_mode(False)
def check_split(model: SplitNet, x: Tensor) -> None:
    """Check on a few of the images (B,3,H,W) that the model computes what its merged network computes.

    It does so in eval mode, with gradients and without; in train mode it checks that the merged network returns what
    its last layer does. The last weight is another one, which shows whether something else reads it, too.
    Raises ValueError if the outputs differ.
    """
    x = on_device(x[:8], model).clone()
    weight, name = model.classifier.weight.detach(), model.linear_name
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    moved = weight + (0.1 * weight.std() + 0.01) * noise  # a weight of zeros moves, too
    whole = model._whole(moved)
    for gradients in (True, False):  # without them last: a network that keeps a result with a history cannot be copied
        with torch.set_grad_enabled(gradients), eval_mode(whole), examined(model):
            expected = run(whole, x, whole, "its copy fails")
            features = run(model.features, x, whole, f"without {name} its forward fails")
        if not isinstance(expected, Tensor) or not isinstance(features, Tensor):
            got = expected if not isinstance(expected, Tensor) else features
            raise refusal(whole, f"it returns a {type(got).__name__}, takes one tensor of logits")
        if features.dim() != 2 or features.shape[1] != model.classifier.in_features:
            raise refusal(whole, f"without {name} it returns {tuple(features.shape)}, takes features (B,D)")
        logits = run(lambda f: F.linear(f, moved, model.classifier.bias), features, whole, f"{name} alone fails")
        logits = logits.log_softmax(1) if model.log_softmax else logits
        if not same(logits, expected, 1e-3):
            mode = "with gradients" if gradients else "without gradients"
            raise refusal(whole, f"in eval mode, {mode}, something else than {name} computes its output")
    with torch.enable_grad():
        output, calls = noted(whole, x, training=True)
    made = calls.get(name, [])
    ends = [call.makes_log_softmax(output) if model.log_softmax else call.makes(output) for call in made]
    if ends != [True]:
        raise refusal(whole, f"in train mode something else than {name} computes its output")
    model.proven = True
