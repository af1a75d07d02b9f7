"""TL209: fused and foreach steps where they are known to fail."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import name_optimizer, plural
from trainlint.recording.schema import Optimizer, ParamGroup, ScalerEvent

#: Bytes of one element.
_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "complex64": 8, "complex128": 16}
#: A peak at this share of the device's memory leaves no room for a larger batch or for another process.
FULL = 0.9


@check("TL209", Recording, severity="warning", catalog="O11")
def fused_or_foreach_hazard(run: Recording) -> Iterator[Finding]:
    """Fused and foreach steps where they are known to fail.

    ## What goes wrong
    **fused under FSDP's ShardedGradScaler.** A fused optimizer looks for overflow and takes the loss scale off by
    itself, so `scaler.step` never calls `unscale_`. But `unscale_` is the only place in which the sharded scaler
    tells the other ranks that one has overflowed. The rank with the overflow skips the step, the others take it, and
    from then on the scales and the weights of the ranks differ. Calling `unscale_` first (for clipping) does not
    help: the step then raises. Reproduced with two ranks on torch 2.13.

    **foreach without room.** torch steps CUDA parameters in lists (foreach) unless told otherwise, which needs
    temporary memory of about the size of the parameters at once. The step is then where the program runs out of
    memory, though model, gradients and state fit.

    ## How it is detected
    The first: an enabled ShardedGradScaler stepped an optimizer that has a fused group, in a job of several processes.
    The second: the program died of an out-of-memory error inside a foreach step; the size of the parameters is given.
    Or, on a CUDA device: over the watched steps the allocator's peak was passed last inside an optimizer step, needed
    temporary memory beyond what was held before and after it, and lies within 10% of the device's memory.

    ## What to do
    Use `fused=False` under a ShardedGradScaler, or bfloat16, which needs no scaler. Where foreach does not fit, pass
    `foreach=False`, or `fused=True`, which needs no temporary memory.

    ## When it may be wrong
    The first needs an overflow on some ranks and not on others to do harm, which is usual while the scale is being
    found. Under the plain GradScaler fused steps are right since torch 2.1, and are not reported. A run whose step fits
    barely may stay as it is for ever, when its batches never grow and nothing else uses the device.

    ## References
    torch.distributed.fsdp.sharded_grad_scaler; pytorch/pytorch issues 140514 and 97712; torch.optim, "foreach".
    """
    if not run.optimizers:
        raise NotApplicable("no torch optimizer was built")
    fused = [o for o in run.optimizers if any(g.hyperparameters.get("fused") for g in o.groups)]
    scaled = {
        e.optimizer
        for e in run.events
        if isinstance(e, ScalerEvent) and e.call == "step" and e.enabled and e.class_name == "ShardedGradScaler"
    }
    for optimizer in fused if run.program.world_size > 1 else ():
        if optimizer.id in scaled:
            yield _scaler(run, optimizer)
    out_of_memory = _died_in_foreach(run)
    if out_of_memory:
        optimizer = max(run.optimizers, key=lambda o: _bytes(run, o))
        yield _memory(run, optimizer)
        return
    in_lists = [o for o in run.optimizers if o.steps and any(_foreach(run, g) for g in o.groups)]
    if in_lists and _step_fills_device(run):
        yield _barely(run, max(in_lists, key=lambda o: _bytes(run, o)))
        return
    if fused or any(_foreach(run, g) for o in run.optimizers for g in o.groups):
        if not any(o.steps for o in run.optimizers):
            raise NotObserved("no optimizer step was seen; raise --timeout or --steps")
        return
    raise NotApplicable("no fused or foreach optimizer is in use")


def _foreach(run: Recording, group: ParamGroup) -> bool:
    chosen = group.hyperparameters.get("foreach")
    if chosen is None and "foreach" in group.hyperparameters:
        return (run.program.device or "").startswith("cuda") and group.hyperparameters.get("fused") is None
    return bool(chosen)


def _scaler(run: Recording, optimizer: Optimizer) -> Finding:
    ranks = run.program.world_size
    return Finding(
        f"{name_optimizer(optimizer)} is fused and stepped by a ShardedGradScaler, in {plural(ranks, 'process')}: a "
        "fused step looks for overflow on its own rank only, so a rank that overflows skips the step while the others "
        f"take it, and the ranks' weights and loss scales part (torch {run.program.torch or 'version unknown'}).",
        at=optimizer.at,
        evidence={"world_size": ranks, "torch": run.program.torch, "optimizer": optimizer.class_name},
        fix="Pass fused=False under a ShardedGradScaler, or train in bfloat16, which needs no loss scaling.",
        about="sharded-scaler",
    )


def _died_in_foreach(run: Recording) -> bool:
    error = run.ending.error or ""
    lines = run.ending.traceback
    return "OutOfMemoryError" in error and any("_multi_tensor_" in line or "_foreach_" in line for line in lines)


def _bytes(run: Recording, optimizer: Optimizer) -> int:
    parameters = {p.id: p for p in run.parameters}
    held = [parameters[i] for g in optimizer.groups for i in g.parameters if i in parameters]
    return sum(p.numel * _SIZES.get(p.dtype, 4) for p in held if p.requires_grad)


def _memory(run: Recording, optimizer: Optimizer) -> Finding:
    needed, there = _bytes(run, optimizer), run.program.device_memory_bytes
    room = f" of a device with {_size(there)}" if there else ""
    return Finding(
        f"{name_optimizer(optimizer)} ran out of memory inside its foreach step{room}: stepping in lists takes "
        f"temporary memory of about the size of the parameters, {_size(needed)}, on top of model, gradients and state.",
        at=optimizer.at,
        evidence={"parameter_bytes": needed, "device_memory_bytes": there, "optimizer": optimizer.class_name},
        fix=f"Pass foreach=False to {optimizer.class_name}, or fused=True where it has it.",
        about="foreach-memory",
    )


def _step_fills_device(run: Recording) -> bool:
    costs, there = run.costs, run.program.device_memory_bytes
    if costs is None or not there or costs.memory_of != "device" or costs.peak_phase != "optimizer":
        return False
    return (costs.peak_bytes or 0) >= FULL * there and bool(costs.step_temporary_bytes)


def _barely(run: Recording, optimizer: Optimizer) -> Finding:
    costs, there = run.costs, run.program.device_memory_bytes
    assert costs is not None and costs.peak_bytes and costs.step_temporary_bytes and there
    return Finding(
        f"{name_optimizer(optimizer)}'s foreach step is where this run needs the most memory: "
        f"{_size(costs.peak_bytes)} of a device with {_size(there)}, of which {_size(costs.step_temporary_bytes)} is "
        "temporary memory of the step.",
        at=optimizer.at,
        evidence={
            "peak_bytes": costs.peak_bytes,
            "step_temporary_bytes": costs.step_temporary_bytes,
            "device_memory_bytes": there,
            "optimizer": optimizer.class_name,
        },
        fix=f"Pass foreach=False to {optimizer.class_name}, or fused=True where it has it: neither needs that memory.",
        about="foreach-memory",
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
