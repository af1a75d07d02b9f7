"""Half-precision optimizer arithmetic against the same steps in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainlint.recorder.second_moment import SecondMoments


def steps(optimizer: torch.optim.Optimizer, gradients: list[float], *, spread: float = 0.5) -> list[dict[str, Any]]:
    """The payloads of the last of these steps; gradients vary around the given sizes from element to element."""
    watch = SecondMoments(0)
    generator = torch.Generator().manual_seed(0)
    payloads: list[dict[str, Any]] = []
    for size in gradients:
        for group in optimizer.param_groups:
            for p in group["params"]:
                noise = 1 + spread * torch.randn(p.shape, generator=generator)
                p.grad = (size * noise).to(p.dtype)
        watch.before(optimizer, closure=False)
        optimizer.step()
        payloads = [payload for _, payload in watch.after(optimizer)]
    return payloads


def weights(dtype: torch.dtype, n: int = 3000) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n).to(dtype)), torch.nn.Parameter(torch.randn(10, 7).to(dtype))]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_bfloat16_steps_begin_as_those_of_float32(cls: type, options: dict[str, Any]) -> None:
    (payload,) = steps(cls(weights(torch.bfloat16), lr=1e-3, **options), [1.0, 0.8, 1.2])
    assert payload["step_ratio"] == pytest.approx(1.0, abs=0.02)
    assert payload["affected"] < 0.02 * payload["elements"]
    expected = "fused" if options.get("fused") else "foreach" if options.get("foreach") else "for-loop"
    assert payload["implementation"] == expected


def test_a_second_moment_that_cannot_fall_makes_the_steps_smaller() -> None:
    # Gradients shrink a hundredfold: in float32 the second moment follows, in bfloat16 it stays.
    many = [1.0] * 4 + [0.01] * 15
    options = {"lr": 1e-3, "betas": (0.0, 0.99)}
    half = steps(torch.optim.Adam(weights(torch.bfloat16), **options), many, spread=0.0)[0]
    assert half["dtype"] == "bfloat16"
    sticky = steps(torch.optim.Adam(weights(torch.bfloat16), lr=1e-3, betas=(0.0, 0.999)), many, spread=0.0)[0]
    assert sticky["stuck"] == sticky["elements"]
    assert sticky["step_ratio"] < 1.0


def test_float16_divides_by_zero_without_eps() -> None:
    (payload,) = steps(torch.optim.Adam(weights(torch.float16), lr=1e-3), [1e-4, 1e-4])
    assert payload["eps_rounded"] == 0.0
    assert payload["zero"] > 0.9 * payload["elements"]
    assert payload["affected"] > 0.9 * payload["elements"]
    assert payload["affected_ratio"] is None  # infinite


def test_float16_with_an_eps_that_holds() -> None:
    (payload,) = steps(torch.optim.Adam(weights(torch.float16), lr=1e-3, eps=1e-4), [1.0, 1.0])
    assert payload["affected"] < 0.05 * payload["elements"]


def test_fused_steps_compute_in_float32() -> None:
    many = [1.0] * 3
    (payload,) = steps(torch.optim.AdamW(weights(torch.float16), lr=1e-3, fused=True), many)
    assert payload["eps_rounded"] == pytest.approx(1e-8, rel=1e-3)
    assert payload["unbounded"] == 0
    assert payload["step_ratio"] == pytest.approx(1.0, abs=0.02)


def test_a_loss_scale_that_a_fused_step_takes_off() -> None:
    (parameter, _) = weights(torch.bfloat16)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    (payload,) = steps(optimizer, [1024.0, 512.0])
    assert payload["step_ratio"] == pytest.approx(1.0, abs=0.02)


def test_each_group_by_its_own_settings() -> None:
    one, two = weights(torch.bfloat16)
    optimizer = torch.optim.AdamW([{"params": [one], "betas": (0.9, 0.95)}, {"params": [two]}], lr=1e-3)
    first, second = steps(optimizer, [1.0, 1.0])
    assert (first["group"], second["group"]) == (0, 1)
    assert first["stuck"] == 0 and second["stuck"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_costs_nothing(dtype: torch.dtype) -> None:
    assert steps(torch.optim.Adam(weights(dtype), lr=1e-3), [1.0]) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adamax(p),
    ],
)
def test_other_optimizers(make: Any) -> None:
    assert steps(make(weights(torch.bfloat16)), [1.0, 1.0]) == []


def test_float32_state_beside_half_precision_weights() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("exp_avg_sq", torch.zeros_like(p, dtype=torch.float32)).add_(p.grad.float() ** 2)

    assert steps(Own(weights(torch.bfloat16)), [1.0, 1.0]) == []


def test_amsgrad_is_counted_without_a_ratio() -> None:
    (payload,) = steps(torch.optim.Adam(weights(torch.bfloat16), lr=1e-3, amsgrad=True), [1.0, 1.0])
    assert payload["stuck"] > 0
    assert payload["step_ratio"] is None and payload["affected"] is None
