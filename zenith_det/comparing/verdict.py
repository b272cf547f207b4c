"""What a comparison says, in sentences that claim no more than its seeds allow."""

from __future__ import annotations

from zenith_det.comparing.arms import Arm
from zenith_det.comparing.results import AP_TITLES, Comparison
from zenith_det.comparing.statistics import Estimate, paired, signed


def verdict_lines(comparison: Comparison) -> list[str]:
    """The sentences; the first is the headline."""
    tasks = comparison.tasks
    arms = [arm for arm in comparison.arms if any(o.ok for o in comparison.best(arm).outcomes)]
    if not tasks or not arms:
        return ["No run has come to its end yet: there is nothing to conclude."]
    lines = [_headline(comparison, arms, tasks[0])]
    zenith, baselines = comparison.zenith_arms, comparison.baseline_arms
    for task in tasks:
        rivals = [arm for arm in baselines if arm in arms and comparison.best(arm).final(task)]
        own = [arm for arm in zenith if arm in arms and comparison.best(arm).final(task)]
        if rivals and own:
            lines.append(_zenith_line(comparison, own, rivals, task))
    # An arm and its averaged self share their runs.
    missing = {o.run.folder for o in comparison.outcomes if not o.ok}
    if missing:
        total = len({o.run.folder for o in comparison.outcomes})
        lines.append(f"{len(missing)} of {total} runs have no result; see below.")
    return lines


def _mean(comparison: Comparison, arm: Arm, task: str) -> float:
    final = comparison.best(arm).final(task)
    return -1.0 if final is None else final.mean


def _headline(comparison: Comparison, arms: list[Arm], task: str) -> str:
    arms = sorted(arms, key=lambda arm: -_mean(comparison, arm, task))
    best = arms[0]
    final = comparison.best(best).final(task)
    if final is None:
        return f"No run that came to its end has a {AP_TITLES[task]}."
    text = f"{best.label} has the highest {AP_TITLES[task]}, {final.mean:.1f}"
    if final.n == 1:
        return text + ", of one seed each: a hint, not a result."
    level: list[str] = []
    behind: list[str] = []
    for arm in arms[1:]:
        gap = paired(comparison.best(arm).finals(task), comparison.best(best).finals(task))
        (behind if gap is not None and gap.decided else level).append(arm.label)
    text += f" (mean of {final.n} seeds)"
    if not level:
        return text + (", ahead of all others beyond the 95 % confidence interval." if behind else ".")
    others = " and ".join([", ".join(level[:-1]), level[-1]] if len(level) > 1 else level)
    text += f"; by the 95 % confidence interval it cannot be told apart from {others}"
    return text + (f", and is ahead of {', '.join(behind)}." if behind else ".")


def _zenith_line(comparison: Comparison, own: list[Arm], rivals: list[Arm], task: str) -> str:
    zenith = max(own, key=lambda arm: _mean(comparison, arm, task))
    rival = max(rivals, key=lambda arm: _mean(comparison, arm, task))
    gap = paired(comparison.best(zenith).finals(task), comparison.best(rival).finals(task))
    pair = f"{zenith.label} against the best baseline, {rival.label}, by {AP_TITLES[task]}"
    if gap is None:
        return f"{pair}: no seed that both have."
    return f"{pair}: {_gap(gap)}{_times(comparison, zenith, rival, task)}."


def _gap(gap: Estimate) -> str:
    if gap.n == 1:
        return f"{signed(gap.mean)} points, of one seed"
    ends = f"{signed(gap.low)} to {signed(gap.high)}"
    interval = f"{signed(gap.mean)} points (95 % confidence interval {ends}, n = {gap.n})"
    if not gap.decided:
        return f"{interval}, which leaves open which is better"
    return f"{interval}, {'ahead' if gap.mean > 0 else 'behind'}"


def _times(comparison: Comparison, zenith: Arm, rival: Arm, task: str) -> str:
    """How long it takes to what the rival ends at, nearly."""
    final = comparison.best(rival).final(task)
    if final is None or final.mean <= 0:
        return ""
    target = 0.95 * final.mean
    own, other = comparison.reaching(zenith, task, target), comparison.reaching(rival, task, target)
    if own is None:
        return f"; it never reaches 95 % of that baseline's final AP, {target:.1f}"
    if other is None or not other.seconds.mean > 0:
        return ""
    seeds = own.never + own.iterations.n
    never = f" where it gets there ({own.never} of {seeds} seeds never do)" if own.never else ""
    share = own.seconds.mean / other.seconds.mean
    return f"; to 95 % of that baseline's final AP it takes {share:.2f} of its time{never}"
