"""Random legal training programs give nothing; with one line moved or removed they give that fault."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_programs import said


@dataclass(frozen=True)
class Recipe:
    """How a program is written. Every combination trains as it should."""

    style: str  # script, function, class
    clear: str  # first, last, model
    loss: str  # functional, module, arithmetic
    optimizer: str
    accumulate: int
    scaler: bool
    clip: bool
    scheduler: str  # none, step, epoch
    evaluate: bool
    helper: bool  # the loss is computed by a function of another file

    def program(self, plant: str = "") -> str:
        """The program, with one fault planted."""
        body = self._pass(plant)
        model = "nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))"
        if plant == "softmax":
            model = "nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.Softmax(dim=1))"
        made = [
            f"model = {model}",
            f"optimizer = torch.optim.{self.optimizer}(model.parameters(), lr=0.1)",
            "scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)",
            "scaler = torch.amp.GradScaler('cpu')",
            "criterion = nn.CrossEntropyLoss()",
        ]
        loop = ["for epoch in range(3):"]
        if not (plant == "eval" and self.evaluate):
            loop.append("    model.train()")
        loop.append("    for i, (x, y) in enumerate(loader):")
        loop += [f"        {line}" for line in body]
        if self.scheduler == "epoch":
            loop.append("    scheduler.step()")
        if self.evaluate or plant == "eval":
            loop += ["    model.eval()", "    with torch.no_grad():"]
            loop += ["        print(sum(criterion(model(a), b).item() for a, b in held_out))"]
        head = [
            "import torch",
            "from torch import nn",
            "import torch.nn.functional as F",
            "from helpers import objective",
        ]
        if self.style == "script":
            return "\n".join([*head, *made, *loop]) + "\n"
        if self.style == "function":
            text = [*head, "def train(model, optimizer, scheduler, scaler, criterion, loader, held_out):"]
            text += [f"    {line}" for line in loop]
            text += ["def main(loader, held_out):", *(f"    {line}" for line in made)]
            text += ["    train(model, optimizer, scheduler, scaler, criterion, loader, held_out)"]
            return "\n".join([*text, 'if __name__ == "__main__":', "    main(read(), read())"]) + "\n"
        names = ("model", "optimizer", "scheduler", "scaler", "criterion")
        text = [*head, "class Job:", "    def __init__(self):"]
        text += [f"        {_of_self(line, names)}" for line in made]
        text += ["    def run(self, loader, held_out):", *(f"        {_of_self(line, names)}" for line in loop)]
        return "\n".join([*text, "Job().run(read(), read())"]) + "\n"

    def _pass(self, plant: str) -> list[str]:
        loss = {
            "functional": "loss = F.cross_entropy(model(x), y)",
            "module": "loss = criterion(model(x), y)",
            "arithmetic": "loss = F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(model(-x), y)",
        }[self.loss]
        if self.helper:
            loss = "loss = objective(model, x, y)"
        if plant == "detached":
            loss = "with torch.no_grad(): loss = F.cross_entropy(model(x), y)"
        n = self.accumulate
        share = f"loss = loss / {n}" if n > 1 and plant != "undivided" else "pass"
        backward = "scaler.scale(loss).backward()" if self.scaler else "loss.backward()"
        clear = "model.zero_grad()" if self.clear == "model" else "optimizer.zero_grad()"
        clip = ["nn.utils.clip_grad_norm_(model.parameters(), 1.0)"] if self.clip or plant in ("late", "scaled") else []
        unscale = ["scaler.unscale_(optimizer)"] if self.scaler and clip and plant != "scaled" else []
        step = ["scaler.step(optimizer)", "scaler.update()"] if self.scaler else ["optimizer.step()"]
        if self.scheduler == "step":
            step.append("scheduler.step()")
        if plant == "lost":
            ending = [clear, *step]
        elif plant == "late":
            ending = [*step, *clip, clear]
        elif plant == "scheduler":
            ending = ["scheduler.step()", *[s for s in step if s != "scheduler.step()"], clear]
        else:
            ending = [*unscale, *clip, *step, clear]
        first: list[str] = []
        if self.clear == "first" and n == 1 and plant not in ("lost", "late"):
            first, ending = [clear], [line for line in ending if line != clear]
        if plant == "never":
            first, ending = [], [line for line in ending if line != clear]
        if n > 1:
            ending = [f"if (i + 1) % {n} == 0:", *(f"    {line}" for line in ending)]
        return [*first, loss, share, backward, *ending]


def _of_self(line: str, names: tuple[str, ...]) -> str:
    return re.sub(rf"(?<![\w.])({'|'.join(names)})(?=[.,() ]|$)", r"self.\1", line)


HELPERS = """
import torch.nn.functional as F

def objective(model, x, y):
    logits = model(x)
    return F.cross_entropy(logits, y)
"""

RECIPES = st.builds(
    Recipe,
    style=st.sampled_from(["script", "function", "class"]),
    clear=st.sampled_from(["first", "last", "model"]),
    loss=st.sampled_from(["functional", "module", "arithmetic"]),
    optimizer=st.sampled_from(["SGD", "AdamW", "Adam", "RMSprop"]),
    accumulate=st.sampled_from([1, 1, 4]),
    scaler=st.booleans(),
    clip=st.booleans(),
    scheduler=st.sampled_from(["none", "step", "epoch"]),
    evaluate=st.booleans(),
    helper=st.booleans(),
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def found(recipe: Recipe, plant: str = "") -> set[tuple[str, str]]:
    with tempfile.TemporaryDirectory(prefix="trainlint-source-") as folder:
        return {(c, s) for c, s, _ in said(Path(folder), recipe.program(plant), helpers=HELPERS)}


@QUICK
@given(RECIPES)
def test_legal_programs_are_silent(recipe: Recipe) -> None:
    assert found(recipe) == set()


@QUICK
@given(RECIPES, st.sampled_from(["lost", "never", "softmax", "eval"]))
def test_a_planted_fault_is_found_and_no_other(recipe: Recipe, plant: str) -> None:
    code = {"lost": "TL303", "never": "TL304", "softmax": "TL501", "eval": "TL305"}[plant]
    if plant == "eval" and not recipe.evaluate:
        recipe = Recipe(**{**recipe.__dict__, "evaluate": True})
    codes = {c for c, _ in found(recipe, plant)}
    assert code in codes
    assert codes <= {code, *({"TL308"} if plant == "lost" else ())}


@QUICK
@given(RECIPES.filter(lambda r: r.loss != "arithmetic" or r.helper))
def test_an_undivided_accumulation_is_found(recipe: Recipe) -> None:
    recipe = Recipe(**{**recipe.__dict__, "accumulate": 4})
    assert {c for c, _ in found(recipe, "undivided")} == {"TL306"}


@QUICK
@given(RECIPES)
def test_a_detached_loss_is_found(recipe: Recipe) -> None:
    recipe = Recipe(**{**recipe.__dict__, "helper": False, "accumulate": 1})
    assert {c for c, _ in found(recipe, "detached")} == {"TL302"}


@QUICK
@given(RECIPES, st.sampled_from(["late", "scheduler"]))
def test_calls_out_of_order_are_found(recipe: Recipe, plant: str) -> None:
    recipe = Recipe(**{**recipe.__dict__, "scheduler": "none"})
    assert {c for c, _ in found(recipe, plant)} == {{"late": "TL308", "scheduler": "TL401"}[plant]}


@QUICK
@given(RECIPES)
def test_clipping_scaled_gradients_is_found(recipe: Recipe) -> None:
    recipe = Recipe(**{**recipe.__dict__, "scaler": True})
    assert {c for c, _ in found(recipe, "scaled")} == {"TL308"}
