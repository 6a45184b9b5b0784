"""Tests of: dualtrain.progress.meter, .peaks.

Means over slots and ranks, no waiting for the device, throughput, peaks of devices.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from dualtrain.progress.meter import Interval, Meter, train_record
from dualtrain.progress.metrics import Position, TrainRecord
from dualtrain.progress.peaks import peak_flops


class NoSynchronisation(TorchDispatchMode):
    """Fail at whatever would make a GPU's host wait: reading a value, or copying to the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_local_scalar_dense" in name or "_to_copy" in name and (kwargs or {}).get("device"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_means_are_per_slot_and_per_objective():
    meter = Meter("cpu", ar_weight=2.0)
    for cross_entropy in (2.0, 4.0, 9.0):
        meter.add("ar", torch.tensor(cross_entropy), torch.tensor(0.5), tokens=10)
    meter.add("diffusion", torch.tensor(7.0), torch.tensor(1.5), tokens=10, loss=torch.tensor(3.0))
    interval = meter.interval(data_wait_s=0.25)
    assert interval.ar_loss == 2.5  # 15 / 3, and the weight of 2 taken out
    assert interval.diffusion_loss == 7.0
    assert interval.loss == (15.0 + 1.5 + 3.0) / 4
    assert interval.z_loss == 3.0 / 4
    assert (interval.slots, interval.tokens, interval.data_wait_s) == (4, 40, 0.25)
    assert interval.non_finite == ()
    assert interval.memory_bytes > 2**20


def test_no_slot_of_an_objective_is_null_and_intervals_are_separate():
    meter = Meter("cpu")
    meter.add("diffusion", torch.tensor(7.0), tokens=10)
    first, second = meter.interval(), meter.interval()
    assert (first.ar_loss, first.diffusion_loss) == (None, 7.0)
    assert second.diffusion_loss is None and second.loss is None
    assert second.tokens_per_second is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_flagged_with_its_objective(bad):
    meter = Meter("cpu")
    meter.add("ar", torch.tensor(1.0), tokens=1)
    assert bool(meter.finite())
    meter.add("diffusion", torch.tensor(bad), tokens=1)
    meter.add("diffusion", torch.tensor(1.0), tokens=1)
    assert not bool(meter.finite())
    interval = meter.interval()
    assert interval.non_finite == ("diffusion",)
    assert interval.ar_loss == 1.0
    assert bool(meter.finite())


def test_a_finite_cross_entropy_with_a_non_finite_loss_is_flagged():
    meter = Meter("cpu")
    meter.add("ar", torch.tensor(1.0), tokens=1, loss=torch.tensor(math.inf))
    assert meter.interval().non_finite == ("ar",)


def test_adding_never_waits_for_the_device():
    meter = Meter("cpu")
    loss = torch.tensor(1.0, requires_grad=True)
    with NoSynchronisation():
        for _ in range(3):
            meter.add("ar", loss * 2, loss * 0.1, tokens=8)
            meter.log("ratio", loss * 3)
            meter.add_update(loss.detach() * 4)
            meter.finite()
        with pytest.raises(AssertionError, match="waits"):
            loss.item()
    interval = meter.interval()
    assert interval.ar_loss == 2.0
    assert interval.logged == {"ratio": 3.0}
    assert interval.grad_norm == 4.0


def test_a_gradient_norm_that_is_not_finite_is_flagged():
    meter = Meter("cpu")
    meter.add("ar", torch.tensor(1.0), tokens=1)
    meter.add_update(torch.tensor(math.inf))
    assert not bool(meter.finite())
    assert meter.interval().non_finite == ("gradient",)


def test_the_norm_of_a_step_that_is_left_out_is_forgotten():
    meter = Meter("cpu")
    meter.add_update(torch.tensor(2.0))
    meter.mark()
    meter.add_update(torch.tensor(math.nan))
    meter.rewind()
    assert bool(meter.finite())
    meter.add_update(torch.tensor(4.0))
    assert meter.interval().grad_norm == 3.0


def test_sums_keep_the_graph_of_no_slot_alive():
    meter = Meter("cpu")
    meter.add("ar", torch.tensor(1.0, requires_grad=True) * 2, tokens=1)
    assert not meter._sums.requires_grad


def test_many_small_slots_keep_their_precision():
    meter = Meter("cpu")
    value = torch.tensor(11.1)
    for _ in range(3000):
        meter.add("ar", value, tokens=1)
    assert meter.interval().ar_loss == pytest.approx(float(value), rel=1e-12)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dualtrain.progress.meter.time", clock)
    return clock


def test_pauses_do_not_slow_the_tokens_per_second(clock: Clock):
    meter = Meter("cpu", flops_per_token={"ar": 10.0, "diffusion": 20.0}, peak_flops=1e3)
    with meter.paused():
        clock.now += 100
    clock.now += 2
    meter.add("ar", torch.tensor(1.0), tokens=100)
    meter.add("diffusion", torch.tensor(1.0), tokens=50)
    interval = meter.interval()
    assert interval.seconds == 2
    assert interval.tokens_per_second == 75
    assert interval.mfu == (100 * 10 + 50 * 20) / 2 / 1e3


def test_an_interrupted_interval_is_completed(clock: Clock):
    whole, first, second = Meter("cpu"), Meter("cpu"), Meter("cpu")
    for meter in (whole, first):
        meter.add("ar", torch.tensor(0.1), torch.tensor(0.3), tokens=10)
        meter.add_update(torch.tensor(0.3))
        meter.log("x", torch.tensor(1.0))
    clock.now += 3
    saved = first.state_dict()
    clock.now += 1000
    second.load_state_dict(saved)
    clock.now += 2
    for meter in (whole, second):
        meter.add("ar", torch.tensor(0.7), tokens=10)
        meter.add("diffusion", torch.tensor(0.2), tokens=10)
        meter.add_update(torch.tensor(0.1))
        meter.log("x", 2.0)
    expected, found = whole.interval(), second.interval()
    for name in (
        "ar_loss",
        "diffusion_loss",
        "loss",
        "z_loss",
        "grad_norm",
        "slots",
        "tokens",
        "logged",
    ):
        assert getattr(found, name) == getattr(expected, name)
    assert found.seconds == 5
    clock.now += 1
    assert second.interval().seconds == 1


def test_the_clock_starts_when_told(clock: Clock):
    meter = Meter("cpu")
    clock.now += 60
    meter.start()
    clock.now += 1
    assert meter.interval().seconds == 1


def test_record_holds_interval_and_position():
    meter = Meter("cpu")
    meter.add("ar", torch.tensor(1.5), tokens=4)
    meter.log("x", 2)
    record = train_record(
        meter.interval(),
        Position(
            step=3,
            steps=9,
            tokens=12,
            epoch=0.5,
            lr=0.1,
            alpha=0.25,
            ar_slots=3,
            diffusion_slots=0,
            ar_passes=0.5,
            elapsed_s=1.0,
        ),
    )
    assert list(record) == list(TrainRecord.__annotations__)
    assert (record["kind"], record["step"], record["ar_loss"]) == ("train", 3, 1.5)
    assert record["diffusion_loss"] is None and record["mfu"] is None
    assert record["logged"] == {"x": 2.0}


def measure(store: str) -> tuple[Interval, Interval]:
    """Two ranks with different slots: a full interval and an empty one."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meter = Meter("cpu", flops_per_token={"ar": 1.0, "diffusion": 1.0}, peak_flops=1.0)
    if rank == 0:
        meter.add("ar", torch.tensor(1.0), tokens=10)
        meter.add("ar", torch.tensor(4.0), tokens=10)
        meter.log("only_rank_0", 5.0)
    else:
        meter.add("ar", torch.tensor(7.0), tokens=10)
        meter.add("diffusion", torch.tensor(3.0), tokens=10)
    meter.log("both", float(rank))
    meter.add_update(torch.tensor(2.0))
    meter.add_update(torch.tensor(5.0))
    full = meter.interval(data_wait_s=0.5 + 0.25 * rank)
    empty = meter.interval()
    dist.barrier()
    dist.destroy_process_group()
    return full, empty


def test_means_are_over_all_ranks(tmp_path: Path):
    found = on_ranks(measure, str(tmp_path / "store"), ranks=2, tmp_path=tmp_path)
    for interval, empty in found:
        assert interval.ar_loss == 4.0
        assert interval.diffusion_loss == 3.0
        assert interval.loss == 15 / 4
        assert interval.grad_norm == 3.5  # the same on every rank, a mean over updates
        assert (interval.slots, interval.tokens) == (4, 40)
        assert interval.data_wait_s == 0.75  # the slowest rank's
        assert interval.logged == {"both": 0.5, "only_rank_0": 5.0}
        assert interval.mfu == pytest.approx(40 / interval.seconds / 2)
        assert empty.logged == {} and empty.loss is None and empty.grad_norm is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H20", 148),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Intel(R) Xeon(R) CPU", None),
    ],
)
def test_peaks(name: str, tflops: float | None):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
