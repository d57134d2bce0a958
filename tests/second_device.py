"""A device for machines that have none: cuda:0 is pretended, and whole runs go through on it.

Within `second_device()` a tensor that is made on cuda:0, or moved there, is a `Remote`: device,
shape and dtype of a GPU's tensor around one of the CPU with its numbers. Numbers and control flow
are real: Lightning's loop on its CUDA accelerator, scoring in a thread, evaluation, checkpoints.
`run_on` makes such a run, and tells its phases apart.

A test skips with `lacks()` where PyTorch has no longer the private parts that this is built on. It
sees one process, no streams, kernels, rounding, memory or speed, and no `cuda` without an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before torch.cuda is replaced, whose functions it looks up by identity
from lightning import Trainer
from remote import Device, Watching
from runs import composed
from torch import Tensor
from torch.utils import _python_dispatch as dispatch

from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop
from flowrl.evaluation.evaluator import Evaluator
from flowrl.launch.build import build
from flowrl.objectives.forward import ForwardObjective
from flowrl.objectives.reverse import ReverseObjective
from flowrl.parallel import background
from flowrl.training import optimization, policy
from flowrl.training.floor import Floor

PHASES = (
    (policy, "sample_update", "rollout"),
    (policy.Policy, "sample", "decode"),
    (policy, "draw", "rollout"),
    (policy, "assign_advantages", "advantages"),
    (ReverseObjective, "check_gate", "gate"),
    (Floor, "take", "floor"),
    (policy, "step_weights", "step"),
    (optimization, "accumulate_gradients", "terms"),
    (policy.Record, "means", "metrics"),
    (Evaluator, "evaluate", "evaluation"),
    (Checkpoint, "save", "checkpoint"),
)
"""Who does what in a run. Of phases within each other the inner one counts."""


def pinned(tensor: Tensor, device: Any = None) -> Tensor:
    """Return a copy that counts as pinned, since a machine without a driver pins nothing."""
    copy = tensor.clone()
    copy.is_in_pinned_memory = True
    return copy


class Card:
    """The properties of the pretended device."""

    name = "second device"
    major, minor = 9, 0
    total_memory = 80 * 2**30
    multi_processor_count = 132


ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": Card.name,
    "get_device_properties": Card,
    "get_device_capability": (9, 0),
    "is_bf16_supported": True,
    "max_memory_allocated": 0,
    "memory_stats": {},
    "get_rng_state": None,
    "_lazy_init": None,
    "synchronize": None,
    "set_device": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "set_rng_state": None,
}
"""The answers of torch.cuda's functions, whatever they are asked."""


def lacks() -> str:
    """Say which private part of PyTorch is missing; empty where all are there."""
    places = {
        "Tensor._make_wrapper_subclass": (Tensor, "_make_wrapper_subclass"),
        "torch._C._set_only_lift_cpu_tensors": (torch._C, "_set_only_lift_cpu_tensors"),
        "torch._C._nn._parse_to": (torch._C._nn, "_parse_to"),
        "_disable_current_modes": (dispatch, "_disable_current_modes"),
        "return_and_correct_aliasing": (dispatch, "return_and_correct_aliasing"),
    }
    missing = [name for name, (owner, key) in places.items() if not hasattr(owner, key)]
    return f"this PyTorch has no {', '.join(missing)}" if missing else ""


@contextmanager
def second_device() -> Iterator[Device]:
    """Make cuda:0 exist, for this thread and for those that `flowrl.parallel.background` starts."""
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _answering(answer)))
        optimizer = torch.optim.Optimizer
        # It asks C++ whether a graph is being captured on the parameters' device.
        for owner in ("_accelerator", "_cuda"):
            check = f"{owner}_graph_capture_health_check"
            if hasattr(optimizer, check):
                stack.enter_context(mock.patch.object(optimizer, check, _answering(None)))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", pinned))
        stack.enter_context(mock.patch.object(background, "start", _watched(background.start)))
        # Modules that move exchange their parameters, rather than assign what C++ has of them.
        future = torch.__future__
        before = future.get_swap_module_params_on_conversion()
        future.set_swap_module_params_on_conversion(True)
        stack.callback(future.set_swap_module_params_on_conversion, before)
        # torch.tensor(..., device="cuda") makes a tensor of the CPU and moves it in sight.
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.callback(setattr, Device, "used", None)
        Device.used = Device()
        # A backward pass in a thread of PyTorch's own would be out of sight.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Watching())
        yield Device.used


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _watched(start: Callable[..., Any]) -> Callable[..., Any]:
    """Return `background.start` with its work in the device's sight."""

    def started(work: Callable[[], Any], name: str) -> Any:
        def within() -> Any:
            with torch.autograd.set_multithreading_enabled(False), Watching():
                return work()

        return start(within, name)

    return started


def run_on(device: Device, folder: Path, *overrides: str) -> policy.Policy:
    """Make a whole run in `folder` on the device that is in use, and return its policy.

    Raises the device's first refusal, which another error may hide on its way out.
    """
    cfg = composed("debug=smoke", "logger=none", "num_threads=1", *overrides)
    with ExitStack() as stack:
        for owner, name, phase in PHASES:
            work = _in_phase(device, getattr(owner, name), phase)
            stack.enter_context(mock.patch.object(owner, name, work))
        for kind in (ReverseObjective, ForwardObjective):
            term = _counted(device, kind.term)
            stack.enter_context(mock.patch.object(kind, "term", term))
        trained, data, evaluator = build(cfg)
        record = RunRecord(folder=str(folder))
        stop = Stop()
        saver = Checkpoint(record=record, stop=stop, folder=str(folder), **cfg.checkpoint)
        viewer = Evaluate(evaluator=evaluator, record=record, folder=str(folder), **cfg.viewing)
        trainer = Trainer(
            accelerator="cuda",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[stop, viewer, record, saver],
        )
        device.phase = "between"
        try:
            trainer.fit(trained, datamodule=data)
            saver.export(trainer, trained)
        finally:
            if device.refused is not None:
                raise device.refused
    return trained


def _in_phase(device: Device, work: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """Return `work` with its events in a phase of their own."""

    def within(*args: Any, **kwargs: Any) -> Any:
        outer = device.phase
        device.phase = phase
        device.passed.add(phase)
        try:
            return work(*args, **kwargs)
        finally:
            device.phase = outer

    return within


def _counted(device: Device, term: Callable[..., Any]) -> Callable[..., Any]:
    """Return an objective's `term` with its calls in updates counted."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        device.num_terms += device.phase == "terms"
        return term(*args, **kwargs)

    return counted
