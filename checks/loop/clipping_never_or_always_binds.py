"""TL309: a clipping threshold far above, or far below, every gradient norm that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trainlint.contract import Finding, Key, NotApplicable, NotObserved, Recording, check
from trainlint.recording.clips import ClipSite, clip_sites
from trainlint.recording.describe import framework_settings, number, place, plural, uses
from trainlint.recording.intervals import Timeline
from trainlint.recording.schema import ConfigKey

#: How many times above every norm; how many times below: gradients of the first steps are large, and fall.
_ABOVE, _BELOW = 10.0, 30.0
#: Fewest norms to say "never" or "always" of.
_CALLS = 2
#: What the transformers Trainer clips at when nobody says anything.
_TRANSFORMERS_DEFAULT = 1.0


@check("TL309", Recording, severity="info", catalog="")
def clipping_never_or_always_binds(run: Recording) -> Iterator[Finding]:
    """A clipping threshold far above, or far below, every gradient norm that was measured.

    ## What goes wrong
    Clipping by norm is meant to catch the odd large gradient. A threshold ten times above the norm of every step
    catches nothing but an explosion. One far below cuts every step to the same length: the gradient's direction
    is all that is left of it, and with SGD the learning rate means something else (rate times threshold is the length
    of every step). Both usually come from a threshold that was copied from a model with another loss reduction.

    ## How it is detected
    `clip_grad_norm_` returns the norm it found; that of every call between the last backward and the step is
    compared with the threshold. Reported when all of them (two at least) lie below it by a factor of ten or more, or
    above it by a factor of thirty: the first steps, which were watched, usually have the largest gradients.

    ## What to do
    Log the norm that `clip_grad_norm_` returns and set the threshold near the upper end of what is usual. Keep a high
    one as a guard against explosions, a low one where steps of one length are what you want.

    ## When it may be wrong
    Only the first steps were watched. Gradients are usually largest there and fall, so that a threshold that always
    binds now may stop to, and one that never binds is not likely to begin; under a warm-up or after a resume it may be
    otherwise. A threshold that nobody set (the transformers `Trainer` clips at 1.0 by default) and infinite ones are
    not reported, nor is clipping by value.

    ## References
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks" (the threshold as a statistic of the
    average norm).
    """
    sites = [s for s in clip_sites(run, Timeline(run)) if s.method == "norm"]
    if not sites:
        raise NotApplicable("no gradient clipping by norm was called")
    seen = False
    for site in sites:
        norms = _norms(site)
        if len(norms) < _CALLS:
            continue
        seen = True
        if not _chosen(run, site):
            continue
        if site.threshold >= _ABOVE * max(norms):
            yield _finding(run, site, norms, never=True)
        elif 0 < site.threshold <= min(norms) / _BELOW:
            yield _finding(run, site, norms, never=False)
    if not seen:
        raise NotObserved(f"fewer than {_CALLS} gradient norms were seen by clipping before a step; raise --steps")


def _norms(site: ClipSite) -> list[float]:
    """Norms that one threshold met right before a step; empty when the calls differ or come elsewhere too."""
    if any(c.when == "between" or c.clip.scaled for c in site.calls):
        return []
    if any(c.threshold != site.threshold for c in site.clips):
        return []  # a threshold that adapts itself
    calls = {c.clip.seq: c.clip.total_norm for c in site.calls if c.when == "last"}
    return [n for n in calls.values() if n is not None and math.isfinite(n) and n > 0]


def _chosen(run: Recording, site: ClipSite) -> bool:
    """Whether somebody set this threshold: not the default of a trainer."""
    default = framework_settings(run, "transformers").get("max_grad_norm") == _TRANSFORMERS_DEFAULT
    if uses(run, "transformers") and default and site.threshold == _TRANSFORMERS_DEFAULT:
        return _key(run, site) is not None
    return True


def _key(run: Recording, site: ClipSite) -> ConfigKey | None:
    keys = [k for k in (run.config.keys if run.config is not None else ()) if k.meaning == "clip_norm"]
    return next((k for k in keys if k.value == site.threshold and k.origin != "default"), None)


def _finding(run: Recording, site: ClipSite, norms: Sequence[float], *, never: bool) -> Finding:
    low, high = min(norms), max(norms)
    key = _key(run, site)
    name = f"{site.function} ({place(site.at)})" if site.at is not None else site.function
    setting = f", from {key.path}" if key is not None else ""
    found = f"{number(low)} to {number(high)}" if high > 1.005 * low else number(high)
    met = f"threshold {number(site.threshold)}{setting}; the {plural(len(norms), 'norm')} that it met: {found}"
    if never:
        message = (
            f"{name} never binds: {met}. Even the largest is {number(site.threshold / high)} times smaller, and "
            "gradients are usually largest in the first steps, which these are."
        )
        fix = f"Fine as a guard against explosions. To act on unusual steps it should be near {number(2 * high)}."
    else:
        message = (
            f"{name} binds at every step: {met}. Every step is cut to one length, {number(low / site.threshold)} times "
            "shorter or more. Gradients are often largest in the first steps, which these are."
        )
        fix = f"Fine if steps of one length are meant. To cut only unusual ones it should be near {number(2 * high)}."
    return Finding(
        message,
        at=Key(key.path) if key is not None else site.at,
        evidence={"threshold": site.threshold, "norms": list(norms[:16]), "binds": "never" if never else "always"},
        fix=fix,
        about="never" if never else "always",
    )
