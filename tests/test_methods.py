"""Each method against its formulas: steps in float64 from one state and one noise, beside a literal transcription."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transcriptions
from torch import nn

from fastafd import train
from fastafd.attacks import PGD
from fastafd.console import Console
from fastafd.data import ArraySplit, Augment, to_unit
from fastafd.data.loaders import Loader, ResidentLoader, epoch_order
from fastafd.fast_at import ATASStep, FreeStep, GradAlignStep, Replayed
from fastafd.methods.grad_align import misalignment
from fastafd.models import disentangle, split
from fastafd.optim import learning_rate, make_sgd
from fastafd.recipes import OF_OTHERS, find_recipe, matched
from fastafd.rift import choose_mixture, criticality, hold_out, mix
from fastafd.step import TrainStep

CLASSES, BATCH, STEPS, EPS = 5, 6, 12, 8 / 255
EPOCHS = [10] * 8 + [11] * 4  # of the batches, counted from 1: noisy replay ends after the tenth


def small_net() -> nn.Module:
    """Its statistics are such that adversarial fine-tuning turns its features away from where they were."""
    torch.manual_seed(1)
    convolution = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)).double()
    net[1].running_mean.fill_(0.6)
    net[1].running_var.fill_(0.02)
    return net


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def draws(data, normal: bool = False) -> list[torch.Tensor]:
    """The uniform (or standard normal) draws that a step seeded with 0 makes for these batches."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for x, _ in data:
        like = torch.empty_like(x, memory_format=torch.channels_last)
        if normal:
            found.append(like.normal_(0.0, 0.001, generator=generator) / 0.001)
        else:
            found.append(like.uniform_(-EPS, EPS, generator=generator))
    return found


def floats(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if value.is_floating_point()}


def assert_same(ours: nn.Module, literal: nn.Module, tolerance: float = 1e-9) -> None:
    assert floats(ours).keys() == floats(literal).keys()
    for name, value in floats(ours).items():
        torch.testing.assert_close(
            value, floats(literal)[name], rtol=tolerance, atol=1e-2 * tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


def step_of(recipe: str, net: nn.Module, engine: str = "reference") -> TrainStep:
    """A step of the recipe, from the weights of `net`, without an average."""
    config = find_recipe(recipe)
    model = disentangle(net) if config.method.disentangled else split(net)
    sgd = config.sgd
    return TrainStep(
        model,
        make_sgd(model, sgd.lr, sgd.momentum, sgd.weight_decay, config.d2_weight_decay),
        config.method,
        teacher=net if config.method.begins == "natural" else None,
        attack=config.attack,
        attack_bn=config.attack_bn,
        per_epoch=1,
        amp="fp32",
        engine=engine,
    )


BOTH = ("reference", "fast")


@pytest.mark.parametrize(
    "recipe, engine",
    [
        *[(recipe, engine) for recipe in ("vaft", "afkd", "arrest", "vaft_d", "vaft_a", "pgd_at") for engine in BOTH],
        ("trades", "reference"),
    ],
)
def test_method_is_its_transcription(recipe, engine):
    literal, data = small_net(), batches(STEPS)
    start = copy.deepcopy(literal)
    step = step_of(recipe, literal, engine)
    for (x, y), epoch in zip(data, EPOCHS, strict=True):
        step.steps = step.steps if recipe != "arrest" else epoch - 1  # per_epoch is 1
        metrics = step(x, y, probe=True)
    transcription = getattr(transcriptions, recipe)
    if recipe == "arrest":
        replayed = transcription(literal, data, draws(data), EPOCHS)
        assert True in replayed[:8] and False in replayed[:8]
        plain = copy.deepcopy(start)
        transcriptions.afkd(plain, data, draws(data))
        assert not torch.allclose(plain[-1].weight, literal[-1].weight, rtol=1e-3)  # replay makes a difference
    else:
        found = transcription(literal, data, draws(data, normal=recipe == "trades"))
        if found is not None:  # with D1
            _, d1, d2, linear = found
            torch.testing.assert_close(step.model.d2.weight, d2.weight, rtol=1e-9, atol=1e-11)
            linear.weight.data = linear.weight @ d1.weight
    assert not torch.allclose(start[-1].weight, literal[-1].weight)
    # With weight decay, of two optimizers that are one here (vaft_d), up to what the released order leaves undefined.
    assert_same(step.averaged().merge(), literal)
    wanted = {"own_gap_linf", "clean_accuracy"} | ({"gap_linf"} if step.taught else set())
    assert (
        wanted <= metrics.keys()
    )  # the distance from natural features, whether or not a method looks at them (Fig. 1a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["vaft", "afkd", "arrest", "vaft_d", "pgd_at"])
def test_recorded_steps_are_the_reference(recipe):
    """In float64: warm-up, recording, replays; noisy replay while its epochs last and after."""
    both = []
    for engine in BOTH:
        step = step_of(recipe, small_net().cuda(), engine)
        for (x, y), epoch in zip(batches(STEPS), EPOCHS, strict=True):
            step.steps = step.steps if recipe != "arrest" else epoch - 1
            metrics = step(x.cuda(), y.cuda(), probe=True)
        both.append((step, metrics))
    (reference, expected), (fast, found) = both
    assert fast.graphs.works and len(fast.graphs.recorded) == 1 and found.keys() == expected.keys()
    assert_same(fast.averaged().merge(), reference.averaged().merge(), 1e-6)


def test_free_at_is_its_transcription():
    literal, data, times = small_net(), batches(4), 3
    model = split(literal)
    config = find_recipe("free_at")
    sgd = config.sgd
    optimizer = make_sgd(model, 0.0, sgd.momentum, sgd.weight_decay)
    method = type(config.method)(replays=times)
    step = FreeStep(model, optimizer, method, ball=config.attack, amp="fp32", engine="reference")
    total = times * len(data)
    rates = [learning_rate(k, total, sgd.lr, sgd.lr_schedule, sgd.lr_between) for k in range(total)]
    assert rates[0] == 0 and max(rates) == pytest.approx(0.04)
    for k, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        step(*data[k // times])
    delta = transcriptions.free_at(literal, data, rates, times)
    assert_same(model.merge(), literal)
    torch.testing.assert_close(step.delta, delta, rtol=0, atol=1e-12)
    assert delta.abs().max() <= EPS + 1e-12 and delta.abs().max() > 0


def test_fgsm_with_grad_align_is_its_transcription():
    literal, data = small_net(), batches(6)
    model, config = split(literal), find_recipe("fgsm_ga")
    sgd = config.sgd
    optimizer = make_sgd(model, 0.0, sgd.momentum, sgd.weight_decay)
    step = GradAlignStep(model, optimizer, config.method, ball=config.attack, amp="fp32", engine="reference")
    rates = [learning_rate(k, len(data), sgd.lr, sgd.lr_schedule, sgd.lr_between) for k in range(len(data))]
    for (x, y), rate in zip(data, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        metrics = step(x, y)
    transcriptions.fgsm_ga(literal, data, draws(data), rates)
    assert_same(model.merge(), literal, 1e-7)  # second derivatives, at rates up to 0.3
    assert 0 < metrics["misalignment"] < 2


def test_misalignment_leaves_out_what_has_no_gradient():
    u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 3.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = misalignment(u, v)
    assert float(found.detach()) == pytest.approx((1 + 0) / 2)
    found.backward()
    assert v.grad.isfinite().all() and not v.grad[1].any() and not v.grad[3].any() and v.grad[0].any()
    nothing = misalignment(torch.zeros(2, 3), torch.ones(2, 3))
    assert float(nothing) == 0


class Images(Loader):
    """uint8 images of random pixels in batches, in the usual order."""

    kind = "test"

    def __init__(self, n: int):
        super().__init__(n, BATCH, 0, True, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=generator)
        self.y = torch.randint(0, CLASSES, (n,), generator=generator)

    def deliver(self, order):
        for first in range(0, len(order), self.batch_size):
            batch = torch.from_numpy(order[first : first + self.batch_size])
            yield self.x[batch], self.y[batch]


def atas_step(net: nn.Module, loader: Loader, epochs: int, **fields) -> ATASStep:
    model, config = split(net), find_recipe("atas")
    optimizer = make_sgd(model, 0.1, config.sgd.momentum, config.sgd.weight_decay)
    method = type(config.method)(warm_up=1, redraw_every=3, **fields)
    around = {"augment": Augment(1, True, 0), "amp": "fp32", "engine": "reference"}
    return ATASStep(model, optimizer, method, ball=config.attack, loader=loader, epochs=epochs, **around)


def test_atas_is_its_transcription():
    """Four epochs: a warm-up, adaptive steps, a redraw before the third, one more; crops, flips, per-image state."""
    literal, loader, epochs = small_net(), Images(3 * BATCH), 4
    step = atas_step(literal, loader, epochs, step_c=0.05)
    augment, data = Augment(1, True, 0), []
    for epoch in range(epochs):
        order = epoch_order(loader.n, 0, epoch)
        data.append([])
        for index, (x, y) in enumerate(loader.epoch(epoch)):
            offsets, flips = augment.draw(len(x))
            pixels = to_unit(x).double()
            data[-1].append((torch.from_numpy(order[BATCH * index :][:BATCH]), pixels, y, offsets, flips))
            step(x, y)
    generator = torch.Generator().manual_seed(0)
    first, again = (
        torch.empty(loader.n, 3, 10, 10, dtype=torch.float64).uniform_(-EPS, EPS, generator=generator) for _ in range(2)
    )
    # Pixels of the batch are float32 divisions by 255 in either.
    deltas, v = transcriptions.atas(
        literal, data, [first], [0.1] * epochs, resets={2: again}, padding=1, warmup=1, c=0.05
    )
    assert_same(step.averaged().merge(), literal, 1e-8)
    torch.testing.assert_close(step.deltas, deltas, rtol=0, atol=1e-9)
    torch.testing.assert_close(step.squares, v, rtol=1e-7, atol=1e-15)
    lengths = step.method.step_sizes(step.squares).flatten()
    assert (
        (lengths > 4 / 255 + 1e-6) & (lengths < 14 / 255 - 1e-6)
    ).any()  # some are neither at the one bound nor the other


@pytest.mark.parametrize("kind", ["free", "atas", "grad_align"])
def test_what_outlives_a_batch_is_resumed(kind, tmp_path):
    """A stop in the middle of an epoch, and of a batch's passes: the same weights and state, bit for bit."""
    from fastafd.checkpoint import load_run, save_run

    images = Images(3 * BATCH)
    loader = Replayed(images, 4) if kind == "free" else images

    def make():
        net = small_net()
        if kind == "atas":
            return atas_step(net, loader, 3)
        model, config = split(net), find_recipe("free_at" if kind == "free" else "fgsm_ga")
        method = type(config.method)(replays=4) if kind == "free" else config.method
        around = {"augment": Augment(1, True, 0), "amp": "fp32", "engine": "reference", "ball": config.attack}
        of = FreeStep if kind == "free" else GradAlignStep
        return of(model, make_sgd(model, 0.05, 0.9, 5e-4), method, **around)

    def run(step, first, last):
        for index in range(first, last):
            epoch, batch = divmod(index, len(loader))
            for x, y in loader.epoch(epoch, batch):
                step(x, y)
                break

    whole, stopped, resumed = make(), make(), make()
    end = 2 * len(loader)
    middle = len(loader) + 2
    run(whole, 0, end)
    run(stopped, 0, middle)
    save_run(tmp_path / "last.pt", {"step": stopped.state_dict(), "progress": {}})
    resumed.load_state_dict(load_run(tmp_path / "last.pt")["step"])
    run(resumed, middle, end)
    for name, value in floats(resumed.averaged()).items():
        assert torch.equal(value, floats(whole.averaged())[name]), name
    for held in ("delta", "deltas", "squares"):
        if hasattr(whole, held):
            assert torch.equal(getattr(resumed, held), getattr(whole, held)), held


def test_replayed_batches():
    loader = Replayed(Images(2 * BATCH), 3)
    plain = [y for _, y in Images(2 * BATCH).epoch(1)]
    assert len(loader) == 6 and [y.tolist() for _, y in loader.epoch(1)] == [
        y.tolist() for y in plain for _ in range(3)
    ]
    for start in range(7):
        assert [y.tolist() for _, y in loader.epoch(1, start)] == [y.tolist() for y in plain for _ in range(3)][start:]


# -- RiFT ---------------------------------------------------------------------------------------------------------


def test_criticality_is_its_transcription():
    net = small_net().eval()
    x, y = batches(1)[0]
    for radius in (0.1, 1e-3):  # the ball does not bind, and binds
        ours = criticality(net, x, y, radius=radius, climbs=4, batch_size=BATCH, console=Console())
        literal = transcriptions.rift_criticality(net, x, y, steps=4, radius=radius)
        assert list(ours) == list(literal) == ["0", "5"]
        assert ours == pytest.approx(literal, rel=1e-9)
    assert all(not p.grad for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("engine", BOTH)
def test_fine_tuning_of_one_module_is_its_transcription(engine):
    literal, data = small_net(), batches(5)
    net = copy.deepcopy(literal).requires_grad_(False)
    net.get_submodule("0").requires_grad_()
    step = TrainStep(net, make_sgd(net, 0.01, 0.9, 5e-4), find_recipe("rift").method, amp="fp32", engine=engine)
    for x, y in data:
        step(x, y)
    transcriptions.rift_finetune(literal, "0", data, [0.01] * 5)
    assert_same(net, literal)


def test_mixing_is_its_transcription():
    robust, tuned = small_net().state_dict(), {k: v + 1 for k, v in small_net().state_dict().items()}
    for share in (0.0, 0.3, 1.0):
        ours, literal = mix(robust, tuned, share), transcriptions.rift_interpolate(robust, tuned, share)
        for name in literal:
            torch.testing.assert_close(ours[name], literal[name], rtol=1e-12, atol=1e-12)


def test_mixture_is_the_best_on_clean_images_that_loses_no_robustness(monkeypatch):
    from fastafd import rift

    of_share = {0.0: (0.5, 0.40), 0.1: (0.7, 0.41), 0.2: (0.7, 0.40), 0.3: (0.8, 0.38), 1.0: (0.9, 0.1)}
    seen = []

    def accuracy(net, x, y, attack, *_):
        share = round(float(net[-1].bias.detach()[0]), 1)
        seen.append((share, attack))
        clean, robust = of_share.get(share, (0.9, 0.0))
        return torch.arange(100) < 100 * (clean if attack is None else robust)

    monkeypatch.setattr(rift, "accuracy_under", accuracy)
    robust, tuned = small_net(), small_net()
    robust[-1].bias.data.fill_(0.0)
    tuned[-1].bias.data.fill_(1.0)
    held = ArraySplit(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64))
    for drop, expected in ((0.001, 0.2), (0.025, 0.3)):
        mixed, rows, share = choose_mixture(robust, tuned, held, PGD(), drop, 0, Console())
        assert share == expected and float(mixed[-1].bias.detach()[0]) == pytest.approx(expected) and len(rows) == 11


def test_held_out_images_are_not_trained_on(digit_tree):
    from fastafd.data import load_dataset
    from fastafd.settings import UsageError

    whole = load_dataset("imagefolder", digit_tree).train
    train_part, held = hold_out(whole, 40, 0)
    assert len(train_part) == 200 and len(held) == 40 and np.bincount(held.labels).tolist() == [4] * 10
    together = np.concatenate([train_part.images(), held.images()])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in whole.images())
    with pytest.raises(UsageError, match=r"held_out: got 121, takes at most half of the 240"):
        hold_out(whole, 121, 0)


# -- recipes and runs ---------------------------------------------------------------------------------------------


def test_published_settings_of_the_others():
    """The numbers of their sources, once more, so that a slip in a recipe is seen."""
    of = {recipe.__name__: recipe() for recipe in OF_OTHERS}
    for name in ("vaft", "afkd", "arrest"):
        config = of[name]
        assert (config.sgd.epochs, config.sgd.lr, config.sgd.weight_decay, config.ema_decay) == (20, 0.025, 5e-4, 0)
        assert (config.attack.step_size, config.attack.steps, config.attack_bn) == (2 / 255, 10, "eval")
    assert of["afkd"].method.rgkd == of["arrest"].method.rgkd == 50
    assert (of["arrest"].method.replay_angle, of["arrest"].method.replay_epochs) == (30, 10)
    for name in ("pgd_at", "trades"):
        sgd = of[name].sgd
        rates = [learning_rate(e, sgd.epochs, sgd.lr, sgd.lr_schedule) for e in range(120)]
        assert rates == pytest.approx([0.1] * 75 + [0.01] * 15 + [0.001] * 10 + [0.0001] * 20)
        assert (sgd.weight_decay, sgd.batch_size, of[name].ema_decay) == (2e-4, 128, 0)
    assert of["trades"].method.kl_weight == 6 and of["trades"].attack.step_size == 0.007
    assert of["pgd_at"].attack.step_size == 2 / 255
    free, align, atas, rift = (of[name] for name in ("free_at", "fgsm_ga", "atas", "rift"))
    assert (free.sgd.epochs, free.method.replays, free.sgd.lr, free.sgd.weight_decay) == (10, 8, 0.04, 5e-4)
    assert (align.sgd.epochs, align.sgd.lr, align.method.align_weight) == (30, 0.3, 0.2)
    assert [learning_rate(e, 30, 0.3, align.sgd.lr_schedule, "lines") for e in (0, 6, 12, 21, 30)] == pytest.approx(
        [0, 0.15, 0.3, 0.15, 0]
    )
    rates = [learning_rate(e, 30, 0.1, atas.sgd.lr_schedule) for e in range(30)]
    assert rates == pytest.approx([0.1] * 24 + [0.01] * 4 + [0.001] * 2)
    method = atas.method
    assert (method.step_c, method.step_decay, method.step_low, method.step_high) == (0.01, 0.5, 4 / 255, 14 / 255)
    assert (method.warm_up, method.redraw_every) == (5, 10)
    rates = [learning_rate(e, 10, 0.001, rift.sgd.lr_schedule) for e in range(10)]
    assert rates == pytest.approx([0.001] * 5 + [0.0001] * 5)
    assert (rift.method.radius, rift.method.climbs, rift.sgd.weight_decay) == (0.1, 10, 5e-4)
    for config in of.values():
        assert config.attack.eps == 8 / 255 and config.sgd.momentum == 0.9 and config.sgd.batch_size == 128


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in OF_OTHERS])
def test_matched_is_afds_own_conditions(recipe):
    own, afd = find_recipe(recipe), find_recipe("released")
    ours = matched(own)
    assert (ours.sgd, ours.attack_bn, ours.ema_decay, ours.method) == (afd.sgd, afd.attack_bn, 0.999, own.method)
    assert type(ours.attack) is type(own.attack) and ours.attack.eps == afd.attack.eps
    if isinstance(own.attack, PGD):
        assert vars(ours.attack) == vars(afd.attack)


def test_flags_go_over_what_is_matched(tmp_path):
    given = train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01", "--attack.steps", "3"])
    assert (given.sgd.lr, given.attack.steps, given.attack.step_size, given.sgd.weight_decay) == (0.01, 3, 0.007, 1e-3)
    written = tmp_path / "config.yaml"
    written.write_text("recipe: vaft\nmatched: true\nlr: 0.01\n")
    assert train.parse(["--config", str(written)]) == train.parse(["--recipe", "vaft", "--matched", "--lr", "0.01"])
    assert train.parse(["--recipe", "vaft"]).attack.step_size == 2 / 255


SMALL = "--dataset imagefolder --arch resnet8 --batch-size 16 --epochs 1 --log-every 5 --eval-n 10 --autoattack-n 0"
SMALL += " --loader resident --device cpu --pretrain.epochs 1 --pretrain.batch-size 16"


@pytest.fixture(scope="module")
def robust_run(digit_tree, tmp_path_factory):
    """A run of PGD-AT, from scratch."""
    out = tmp_path_factory.mktemp("runs") / "pgd_at"
    recipe = ["--recipe", "pgd_at", "--attack.steps", "1"]
    train.main([*SMALL.split(), *recipe, "--data-dir", str(digit_tree), "--out", str(out)])
    return out


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in OF_OTHERS])
def test_a_run_of_each_recipe(recipe, digit_tree, robust_run, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / recipe
    more = {"rift": ["--held-out", "40", "--climbs", "1", "--pretrained", str(robust_run)]}.get(recipe, [])
    config = find_recipe(recipe)
    if isinstance(config.attack, PGD):
        more = [*more, "--attack.steps", "1"]
    if recipe == "pgd_at":
        out = robust_run
    else:
        given = ["--recipe", recipe, "--matched", *more, "--data-dir", str(digit_tree), "--out", str(out)]
        train.main([*SMALL.split(), *given])
    result = json.loads((out / "result.json").read_text())
    label, begins = config.method.label, config.method.begins
    assert set(result["models"]) == {label} | ({begins} - {"scratch"})
    assert (out / f"{begins}.safetensors").exists() == (begins != "scratch")
    assert result["models"][label]["pgd20"]["n"] == 10 and math.isfinite(result["seconds"]["finetuning"]["wall"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert ("gap_linf" in lines[-1]) == (begins == "natural") and ("own_gap_linf" in lines[-1]) == (recipe != "rift")
    assert load_file(out / "model.safetensors").keys() == load_file(robust_run / "model.safetensors").keys()
    if recipe == "rift":
        found = result["rift"]
        assert found["module"] in found["criticality"] and len(found["mixtures"]) == 11 and 0 <= found["share"] <= 1
        assert len(found["criticality"]) == 10  # seven 3x3 convolutions, two shortcuts, the classifier
    if recipe == "free_at":
        assert lines[-1]["step"] == 8 * (240 // 16)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--recipe rift --held-out 40", "begins with an adversarially trained model"),
        ("--recipe pgd_at --pretrained example", "begins with fresh weights"),
        ("--recipe arrest --attack.random-start false", "ARREST, which replays its noise"),
        ("--recipe free_at --attack.steps 3", "no such flag"),
    ],
)
def test_mistakes(words, said, digit_tree, tmp_path):
    from fastafd.settings import UsageError

    with pytest.raises(UsageError, match=said):
        train.main([*SMALL.split(), *words.split(), "--data-dir", str(digit_tree), "--out", str(tmp_path / "x")])


def test_what_the_fast_engine_does_not_run_says_so(capsys):
    step = step_of("trades", small_net(), "fast")
    assert not step.fast
    assert "TRADES runs uncompiled, on the reference engine: its attack" in capsys.readouterr().err


def test_the_kl_attack_climbs_the_divergence():
    from fastafd.attacks import KLPGD

    net, (x, y) = small_net().eval(), batches(1)[0]
    attack = KLPGD(eps=EPS, step_size=0.007, steps=10)
    x_adv = attack(net, x, y, torch.Generator().manual_seed(0))
    assert (x_adv - x).abs().max() <= EPS + 1e-12 and x_adv.min() >= 0 and x_adv.max() <= 1
    begun = PGD(steps=0)(net, x, y, torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, attacked, other = (net(images).log_softmax(1) for images in (x, x_adv, begun))
        gained = F.kl_div(attacked, clean, reduction="sum", log_target=True)
        assert (
            gained > 10 * F.kl_div(other, clean, reduction="sum", log_target=True) > 0
        )  # than uniform noise of its size
    assert torch.equal(attack(net, x, 0 * y, torch.Generator().manual_seed(0)), x_adv)  # whatever the labels


def test_the_loader_of_a_run_is_replayed_from_the_middle():
    images = ArraySplit(np.zeros((12, 8, 8, 3), np.uint8), np.arange(12))
    shape = {"n": 12, "batch_size": 4, "seed": 0, "drop_last": True, "device": torch.device("cpu")}
    loader = Replayed(ResidentLoader(images, **shape), 2)
    assert [y.tolist() for _, y in loader.epoch(0, 3)] == [y.tolist() for _, y in loader.epoch(0)][3:]
