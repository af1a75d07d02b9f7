"""arc-state's own command line with one change to its model, as somebody's fork would have it: ``--fault NAME`` first.

python state_fork.py --fault FAULT tx train ...
"""

import sys

import torch
from state.__main__ import main
from state.tx.models.state_transition import StateTransitionPerturbationModel as Model

STEP = Model.training_step
OPTIMIZERS = Model.configure_optimizers


def cut_off(self, batch, batch_idx, *args, **kwargs):
    """The loss is logged as a number, and the number is what is returned."""
    return torch.tensor(STEP(self, batch, batch_idx, *args, **kwargs).item(), requires_grad=True)


def in_eval(self, batch, batch_idx, *args, **kwargs):
    """Left over from an evaluation in the middle of the epoch."""
    self.eval()
    return STEP(self, batch, batch_idx, *args, **kwargs)


def keep_gradients(self, *args, **kwargs):
    """Overridden to save memory, and forgotten."""


def per_epoch(self):
    """A cosine over all optimizer steps, which Lightning steps once per epoch."""
    optimizer = OPTIMIZERS(self)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def new_output(self):
    """The output layer is replaced for a new panel of genes, after the optimizer was built."""
    optimizer = OPTIMIZERS(self)
    old = next(m for m in reversed(list(self.project_out.modules())) if isinstance(m, torch.nn.Linear))
    for module in self.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, torch.nn.Linear(old.in_features, old.out_features))
    return optimizer


def clip_late(self, *args, **kwargs):
    """Clips by hand at the start of the next batch, when the step has been made."""
    torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


FAULTS = {
    "none": {},
    "cut-off": {"training_step": cut_off},
    "eval": {"training_step": in_eval},
    "gradients-kept": {"optimizer_zero_grad": keep_gradients},
    "epoch-cadence": {"configure_optimizers": per_epoch},
    "new-output": {"configure_optimizers": new_output},
    "clip-late": {"on_train_batch_end": clip_late},
}

if __name__ == "__main__":
    at = sys.argv.index("--fault")
    fault = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    for name, function in FAULTS[fault].items():
        setattr(Model, name, function)
    main()
