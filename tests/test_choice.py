"""Choosing the forms of the attack's convolutions by timings; a stand-in for the clock supplies the timings."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_arms import Wide, forms_in, network, snapshot_of
from tiny import Wilful, afd_step, batches, needs_gpu, tiny, unsettled

import fastafd
from fastafd.attacks import Choice, Snapshot, choice, machine
from fastafd.attacks.arms import ARMS
from fastafd.console import Console
from fastafd.training.loop import note_arms

CPU = torch.device("cpu")
X = torch.rand(2, 3, 8, 8, dtype=torch.float64)
STEM = "2x3x8x8, 32x3x3x3, stride 1x1, padding 1x1, relu, float64"
LAST = "2x32x8x8, 32x32x3x3, stride 2x2, padding 1x1, float64"  # its ReLU belongs to the attack head


class Clock:
    """A clock with fixed seconds for each form (1.0 for the plain one); `asked` lists the forms that it timed."""

    def __init__(self, **seconds: float):
        self.seconds, self.asked = seconds, []

    def __call__(self, calls):
        name = next(name for name in calls if name != "plain")
        assert list(calls) == ["plain", name]
        self.asked.append(name)
        return {"plain": 1.0, name: self.seconds[name.replace("+", "_")]}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTAFD_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "BUDGET_S", 1000.0)
    return tmp_path


def chosen_by(clock, snapshot=None, **more) -> Choice:
    made = Choice(snapshot or snapshot_of(network(Wide())), CPU, Console(), clock, lambda function: function, **more)
    made.choose(X)
    return made


def test_nothing_is_timed_on_a_cpu():
    made = Choice(snapshot_of(network(Wide())), CPU, Console())
    made.choose(X)
    assert made.clock is None and made.state() == {} and forms_in(made.snapshot) == []


def test_the_faster_form_is_taken_where_it_was_timed():
    """A slow form is not taken, nor one that wins by less than the margin. Nothing is timed if no arm applies."""
    clock = Clock(fused=0.5, bits=1.5, turned=1 - choice.MARGIN + 0.01, padded=3.0)
    made = chosen_by(clock)
    assert made.chosen == {STEM: "fused", LAST: "plain"}
    assert forms_in(made.snapshot) == ["fused"]
    assert clock.asked == [
        "turned",
        "fused",
        "turned",
        "bits",
        "padded",
    ]  # the convolution with most arithmetic comes first
    assert made.snapshot.net.conv1.forms == {tuple(X.shape): ("fused",)}


def test_forms_that_win_are_tried_together():
    """If two forms together are not faster than the best one, the best one is taken.

    Two arms for the same part are not tried.
    """
    seconds = {"fused": 0.5, "turned": 0.6, "bits": 0.7, "padded": 0.8}
    clock = Clock(**seconds, fused_turned=0.4, fused_turned_padded=0.39)
    made = chosen_by(clock)
    assert [name for name in clock.asked if "+" in name] == ["fused+turned", "fused+turned+padded"]
    assert made.chosen == {STEM: "fused+turned", LAST: "turned"}
    (form,) = {form for form in made.snapshot.net.conv1.forms.values()}
    assert form == ("fused", "turned")


def test_timings_are_kept_and_read(own_cache):
    clock = Clock(fused=0.5, turned=0.97, bits=1.0, padded=1.0)
    chosen_by(clock)
    (file,) = (own_cache / "arms").glob("*.json")
    rows = json.loads(file.read_text())
    assert rows[STEM]["fused"] == {"us": 0.5e6 / choice.SETS, "plain_us": 1e6 / choice.SETS}
    again = Clock()
    assert chosen_by(again).chosen == {STEM: "fused", LAST: "plain"} and again.asked == []
    del rows[STEM]["bits"]  # like a file of a version without that arm
    file.write_text(json.dumps(rows))
    more = Clock(bits=0.2)
    assert chosen_by(more).chosen[STEM] == "bits" and more.asked == ["bits"]
    file.write_text("{ nonsense")
    assert chosen_by(Clock(fused=1.0, turned=0.3, bits=1.0, padded=1.0)).chosen == {STEM: "turned", LAST: "turned"}


def test_a_run_times_for_a_while_and_the_next_goes_on(monkeypatch, capsys):
    """The convolution with most arithmetic is timed first.

    Convolutions that were not timed stay plain, and a line says so.
    """
    seconds = {"fused": 0.5, "turned": 0.5, "bits": 1.0, "padded": 1.0, "fused_turned": 1.0}
    monkeypatch.setattr(choice, "BUDGET_S", 0.0)
    none = Clock(**seconds)
    made = chosen_by(none)
    assert none.asked == [] and made.chosen == {STEM: "plain", LAST: "plain"} and forms_in(made.snapshot) == []
    assert "2 are left to the next run to time" in capsys.readouterr().err
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(choice.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(choice, "BUDGET_S", 5.0)
    one = Clock(**seconds)
    assert chosen_by(one).chosen == {STEM: "plain", LAST: "turned"} and one.asked == ["turned"]
    monkeypatch.setattr(choice, "BUDGET_S", 1000.0)
    rest = Clock(**seconds)
    assert chosen_by(rest).chosen == {STEM: "fused", LAST: "turned"} and "turned" in rest.asked
    assert rest.asked.count("turned") == 1 and "left to the next" not in capsys.readouterr().err.splitlines()[-1]


def test_a_snapshot_follows_another():
    """The certificate's float64 step takes the forms of the step that is verified, and times nothing."""
    first = chosen_by(Clock(fused=0.5, turned=0.6, bits=1.0, padded=1.0, fused_turned=0.3))
    second = Choice(snapshot_of(network(Wide())), CPU, Console(), Clock())
    second.follow(first)
    second.choose(X)
    assert forms_in(second.snapshot) == forms_in(first.snapshot) == ["fused", "turned", "turned"]


def test_a_wrong_form_is_never_taken(monkeypatch, capsys):
    """A fast form whose output or gradient is off by more than the bound is not taken, and a line says so."""
    fused, turned = ARMS["fused"], ARMS["turned"]
    off = {"forward": lambda *operands: tuple(2 * v for v in fused.forward(*operands))}
    monkeypatch.setitem(ARMS, "fused", replace(fused, **off))
    monkeypatch.setitem(ARMS, "turned", replace(turned, dgrad=lambda *operands: turned.dgrad(*operands) * (1 + 1e-6)))
    clock = Clock(bits=1.0, padded=1.0)
    made = chosen_by(clock)
    assert made.chosen == {STEM: "plain", LAST: "plain"} and "fused" not in clock.asked
    log_text = capsys.readouterr().err
    assert f"fused is not used for {STEM}: wrong: its output is off by 100.0%" in log_text
    assert f"turned is not used for {LAST}: wrong: a gradient is off" in log_text


def test_what_cannot_be_timed_is_plain(capsys):
    def clock(calls):
        if "fused" in calls:
            raise RuntimeError("no engine\nfor this shape")
        return {name: 1.0 if name == "plain" else 2.0 for name in calls}

    made = chosen_by(clock)
    assert made.chosen[STEM] == "plain"
    assert "fused is not used for" in (said := capsys.readouterr().err) and "RuntimeError: no engine for this" in said


def test_a_failure_that_passes_is_not_kept(capsys, own_cache):
    """If another process fills the GPU's memory, that is not the form's fault: the next run times it."""

    def full(calls):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    assert chosen_by(full).chosen == {STEM: "plain", LAST: "plain"}
    assert f"turned is not timed for {LAST}: CUDA out of memory. Tried to allocate" in capsys.readouterr().err
    (file,) = (own_cache / "arms").glob("*.json")
    assert list(json.loads(file.read_text()).values()) == [{}, {}]
    later = Clock(fused=0.5, turned=1.0, bits=1.0, padded=1.0)
    assert chosen_by(later).chosen[STEM] == "fused"


def test_timing_leaves_the_generator_of_the_run_alone():
    state = torch.get_rng_state()
    chosen_by(Clock(fused=0.5, turned=1.0, bits=1.0, padded=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_and_shapes_are_differences():
    a = torch.ones(2, 2)
    assert choice.difference((a,), (a,)) == "" and choice.difference((0 * a,), (0 * a,)) == ""
    assert choice.difference((a * float("nan"),), (a,)) and choice.difference((a[:1],), (a,))
    assert choice.difference((a.double(),), (a,)) and choice.difference((a, 1.2 * a), (a, a)).startswith(
        "wrong: a grad"
    )
    assert choice.difference((1.01 * a, 1.05 * a), (a, a)) == "" and choice.difference((1.03 * a,), (a,))


def test_trials_are_compiled_as_the_attack_is():
    """The compiler gets one graph that contains the gradient; here for one convolution."""
    made = Choice(snapshot_of(network(Wide())), CPU, Console(), Clock(turned=0.5))
    made.snapshot.refresh()
    case = made._cases(X)[1]
    row = {}
    assert case.key == LAST and made._best(case, row) == ("turned",) and row["turned"]["us"] > 0


def test_a_resumed_run_keeps_its_forms(capsys, tmp_path):
    """A resumed run keeps its forms although the timings have changed.

    On another machine they are chosen anew, with a line.
    """
    first, second, third = (afd_step(tiny(Wide), "fast") for _ in range(3))
    for step, fused, turned in ((first, 0.5, 1.0), (second, 1.0, 0.5), (third, 1.0, 0.5)):
        choice_of_step = step.engine.choice
        choice_of_step.clock = Clock(fused=fused, turned=turned, bits=1.0, padded=1.0)
        choice_of_step.compile = lambda function: function
    assert "arms" not in first.state_dict()
    first.engine.choice.choose(X)
    state = first.state_dict()
    assert state["arms"] == {"machine": machine(CPU), "forms": {STEM: "fused", LAST: "plain"}}
    for file in (tmp_path / "arms").glob("*.json"):
        file.unlink()
    second.load_state_dict(state)
    second.engine.choice.choose(X)
    assert second.engine.choice.clock.asked == [] and second.arms == first.arms
    capsys.readouterr()
    third.load_state_dict(state | {"arms": state["arms"] | {"machine": "torch 1 NVIDIA H100"}})
    assert "chosen anew: the run started on torch 1 NVIDIA H100, this is torch" in capsys.readouterr().err
    gone = state["arms"]["forms"] | {STEM: "woven"}
    third.load_state_dict(state | {"arms": state["arms"] | {"forms": gone}})
    assert "forms that no longer exist; they are chosen anew: woven" in capsys.readouterr().err
    third.engine.choice._kept.clear()
    third.engine.choice.choose(X)
    assert third.arms["forms"] == {STEM: "turned", LAST: "turned"}


def test_the_run_folder_says_which_forms_were_taken(tmp_path):
    file = tmp_path / "env.json"
    file.write_text('{"device": "a GPU"}')
    note_arms(tmp_path, SimpleNamespace(arms={}))
    assert json.loads(file.read_text()) == {"device": "a GPU"}
    arms = {"machine": "m", "forms": {STEM: "fused"}}
    note_arms(tmp_path, SimpleNamespace(arms=arms))
    assert json.loads(file.read_text()) == {"device": "a GPU", "arms": arms}


def test_a_network_that_cannot_be_traced_has_nothing_to_choose():
    model = network(Wilful())
    made = Choice(Snapshot(model.backbone, torch.float64, model.classifier, model.d1), CPU, Console(), Clock())
    made.choose(X)
    assert made.state() == {}


def test_a_fast_step_chooses_at_its_first_batch():
    step = afd_step(tiny(Wide), "fast", amp="fp32")
    step.engine.choice.clock = Clock(fused=1.0, turned=1.0, bits=0.5, padded=1.0)
    step.engine.choice.compile = lambda function: function
    step(*batches(1)[0])
    forms = {key.split(", stride")[0]: form for key, form in step.arms["forms"].items()}
    assert forms == {"8x3x8x8, 32x3x3x3": "bits", "8x32x8x8, 32x32x3x3": "plain"}


@needs_gpu
@pytest.mark.gpu
def test_forms_on_a_gpu(capsys):
    """In bf16 with the real clock: every form works and is near the plain one; the timings are seconds."""
    model = fastafd.disentangle(unsettled(Wide())).cuda().eval()
    made = Choice(Snapshot(model.backbone, torch.bfloat16, model.classifier, model.d1), torch.device("cuda"), Console())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        made.choose(torch.rand(32, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last))
    assert "is not used for" not in capsys.readouterr().err
    (file,) = (choice.cache_dir() / "arms").glob("*.json")
    timings = [row for forms in json.loads(file.read_text()).values() for row in forms.values()]
    assert len(timings) > 4 and all(0 < row["us"] < 1e5 and 0 < row["plain_us"] < 1e5 for row in timings)
