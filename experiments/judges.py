"""What claims are judged by: functions from a suite's results to a finding, and makers of such.

A verdict says no more than its scale can. The shape of a curve, a failure, an equality or an artefact shows at any; a
loss or a speed of the original's is compared at its own size only; a difference within the noise of its seeds is none.
Trials that are missing, or did not get to an answer, raise `LookupError`: the claim is then not run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import mean, mode
from typing import Any

import train
from experiments import analysis, memory
from experiments.analysis import best
from experiments.run import configuration
from experiments.spec import Finding, Outcome, Results, Verdict

Judge = Callable[[Results], Finding]

ELSEWHERE: Verdict = "not comparable at this scale"
NOISE = 0.003  # nats; seeds at 124M parameters differ by half of it
FAILED = {"nan", "diverged"}


def verdict(holds: bool) -> Verdict:
    return "reproduced" if holds else "refuted"


def at_full(results: Results, holds: bool) -> Verdict:
    """The verdict at the original's size, and none at another."""
    return verdict(holds) if results.outcomes[0].scale == "full" else ELSEWHERE


def some(results: Results, **labels: Any) -> list[Outcome]:
    """The trials with these labels. Raises `LookupError` where there are none."""
    found = results.where(**labels)
    if not found:
        raise LookupError(f"no trials have {labels}")
    return found


def lacks(results: Results, **labels: Any) -> Finding | None:
    """What to say of trials that only the original's size has, at another."""
    if some(results)[0].scale == "full" or results.where(**labels):
        return None
    return Finding("none of this size", ELSEWHERE)


def loss(outcome: Outcome) -> float:
    """The final validation loss, infinite for a run that failed. Raises `LookupError` for one that crashed, was refused
    or ran out of time or memory, of which nothing follows."""
    if outcome.status not in {"finished", *FAILED}:
        raise LookupError(f"the run {', '.join(map(str, outcome.labels.values()))} ended as {outcome.status}")
    return analysis.loss(outcome)


curve = partial(analysis.curve, y=loss)


def difference(a: Sequence[Outcome], b: Sequence[Outcome]) -> tuple[float, float | None]:
    """`analysis.difference` of runs of which each came to an answer."""
    for outcome in (*a, *b):
        loss(outcome)
    return analysis.difference(a, b)


def nats(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no loss"


def words(outcome: Outcome) -> str:
    """How a run ended: its loss, or why it has none."""
    return nats(loss(outcome)) if math.isfinite(loss(outcome)) else outcome.status


def speed(outcomes: Sequence[Outcome]) -> float:
    """Mean steady tokens a second. Raises `LookupError` where one did not get to measure it."""
    speeds = [analysis.throughput(outcome) for outcome in outcomes]
    if not all(speeds):
        raise LookupError(f"no speed, of runs that ended as {', '.join(o.status for o in outcomes)}")
    return mean(speeds)


# Losses and speeds of the original


def bar(bound: float, **labels: Any) -> Judge:
    """The loss at the end is at most `bound`."""

    def judge(results: Results) -> Finding:
        end = mean(loss(outcome) for outcome in some(results, **labels))
        return Finding(nats(end), at_full(results, end <= bound), end - bound if math.isfinite(end) else None)

    return judge


def throughput(theirs: float, **labels: Any) -> Judge:
    """At least as many tokens a second. Where the trainer refused to run, that is what there is to say."""

    def judge(results: Results) -> Finding:
        if absent := lacks(results, **labels):
            return absent
        outcomes = some(results, **labels)
        if refused := [outcome for outcome in outcomes if outcome.status == "unsupported"]:
            return Finding(f"unsupported: {refused[0].error.strip()}", "not run")
        ours = speed(outcomes)
        return Finding(f"{ours:,.0f} tok/s on {outcomes[0].machine}", at_full(results, ours >= theirs))

    return judge


def within(bound: float, seconds: float) -> Judge:
    """Some run's loss is below `bound` within so many seconds."""

    def judge(results: Results) -> Finding:
        y, outcome = min(((loss(o), o) for o in some(results)), key=lambda pair: pair[0])
        times = [t for o in results.outcomes if (t := analysis.first_below(o, bound)) is not None]
        ours = f"{nats(y)} after {outcome.final.get('seconds', 0) / 60:.1f} min"
        if times:
            ours += f"; below {bound:g} after {min(times) / 60:.1f} min"
        return Finding(ours, at_full(results, bool(times) and min(times) <= seconds), y - bound)

    return judge


def corpora(theirs: float) -> Judge:
    """The loss on the second corpus, and both by the byte, which is what compares across tokenizers."""

    def judge(results: Results) -> Finding:
        outcomes = some(results)
        if len(outcomes) != 2 or any(outcome.status != "finished" for outcome in outcomes):
            raise LookupError("two finished runs are compared")
        outcomes.sort(key=lambda outcome: results.values("data.corpus").index(outcome.labels["data.corpus"]))
        ours = "; ".join(
            f"{o.labels['data.corpus']} {nats(loss(o))} nats a token, {o.final['val_bpb']:.3f} bits a byte"
            for o in outcomes
        )
        return Finding(ours, at_full(results, loss(outcomes[1]) <= theirs), loss(outcomes[1]) - theirs)

    return judge


# Curves


def learning_rates(theirs: float, points: int) -> Judge:
    """On a curve of so many points the best rate is inside, and from some rate above it on training fails."""

    def judge(results: Results) -> Finding:
        found = curve(results, "lr")
        if len(found) < points:
            raise LookupError(f"{len(found)} of {points} rates were run")
        (rate, y), limit = best(found), analysis.edge(found)
        fails = f"edge of stability at {limit:g}" if limit is not None else "no edge of stability in the grid"
        delta = y - theirs if results.outcomes[0].scale == "full" else None
        return Finding(
            f"{nats(y)} at {rate:g}; {fails}", verdict(analysis.interior(found) and limit is not None), delta
        )

    return judge


def same_evaluation(results: Results) -> int:
    """The size of the evaluation set that trials of every batch have."""
    return mode(outcome.labels["eval_tokens"] for outcome in some(results))


def equal_tokens(theirs: float) -> Judge:
    """At equal tokens there is a batch up to which the loss is flat, and above which it rises."""

    def judge(results: Results) -> Finding:
        found = curve(results, "batch_size", eval_tokens=same_evaluation(results))
        if len(found) < 3:
            raise LookupError("a saturation takes three batches")
        least, largest = best(found), analysis.largest_within(found, 0.02)
        if math.isinf(least[1]):
            raise LookupError("no batch trains")
        ours = f"{nats(least[1])} at {least[0]}, within .02 up to {largest}, {nats(found[-1][1])} at {found[-1][0]}"
        spread = max(y for _, y in found if math.isfinite(y)) - least[1]
        return Finding(ours, verdict(largest < found[-1][0]), spread - theirs)

    return judge


def evaluation_artefact(results: Results) -> Finding:
    """The smallest batch ends lowest, by more than one model's loss changes with an evaluation set of its batch's
    size."""
    fixed = same_evaluation(results)
    shifts = {}
    for outcome in some(results):
        batch, size = outcome.labels["batch_size"], outcome.labels["eval_tokens"]
        if size != fixed:
            shifts[batch] = loss(outcome) - loss(results.one(batch_size=batch, eval_tokens=fixed))
    shifts = {batch: shift for batch, shift in shifts.items() if math.isfinite(shift)}
    if len(shifts) < 2:
        raise LookupError("no evaluation sets that grow with the batch")
    ends = curve(results, "batch_size", eval_tokens=fixed)
    lowest, second = sorted(y for _, y in ends)[:2]
    lead = second - lowest
    batch = max(shifts, key=lambda b: abs(shifts[b]))
    ours = f"the set alone moves the loss by {shifts[batch]:+.3f} at {batch}; the best batch leads by {lead:.3f}"
    artefact = abs(shifts[batch]) > lead
    return Finding(ours, "artefact" if artefact else verdict(best(ends)[0] == ends[0][0]), shifts[batch])


def by_rule(results: Results, power: float) -> dict[int, Outcome]:
    """By batch, the trials whose rate is a power of the batch times that of the batch at which all rules agree."""
    rates: dict[int, set[float]] = {}
    for outcome in some(results):
        rates.setdefault(outcome.labels["batch_size"], set()).add(outcome.labels["lr"])
    base = next((batch for batch, of in rates.items() if len(of) == 1), None)
    if base is None or len(rates) < 2:
        raise LookupError("no batch at which the rules agree, and others")
    (peak,) = rates[base]
    wanted = {batch: peak * (batch / base) ** power for batch in rates}
    return {
        o.labels["batch_size"]: o
        for o in results.outcomes
        if math.isclose(o.labels["lr"], wanted[o.labels["batch_size"]], rel_tol=1e-9)
    }


def equal_steps(results: Results) -> Finding:
    """At equal steps and one rate the loss falls with the batch; so do the tokens that it is bought with."""
    found = sorted((batch, loss(o)) for batch, o in by_rule(results, 0).items() if math.isfinite(loss(o)))
    if len(found) < 3:
        raise LookupError("fewer than three batches finished")
    falls = all(after < before for (_, before), (_, after) in pairwise(found))
    (small, high), (large, low) = found[0], found[-1]
    ours = f"{nats(high)} at {small} to {nats(low)} at {large}, which sees {large // small} times the tokens"
    return Finding(ours, verdict(falls))


def fits(batch_size: int) -> Judge:
    """Whether the original's failure for want of memory is one here."""

    def judge(results: Results) -> Finding:
        if absent := lacks(results, batch_size=batch_size):
            return absent
        states = {outcome.status for outcome in some(results, batch_size=batch_size)}
        if not states & {"finished", "oom"}:
            raise LookupError(f"ended as {', '.join(sorted(states))}")
        return Finding(", ".join(sorted(states)), at_full(results, "oom" in states))

    return judge


def rule_helps(power: float) -> Judge:
    """At the smallest batch a rate scaled by the rule ends lower than one that is not."""

    def judge(results: Results) -> Finding:
        scaled, fixed = by_rule(results, power), by_rule(results, 0)
        batch = min(scaled)
        delta, half = difference([scaled[batch]], [fixed[batch]])
        ours = (
            f"{words(scaled[batch])} at {scaled[batch].labels['lr']:.2g}, {words(fixed[batch])} unscaled, batch {batch}"
        )
        return Finding(ours, verdict(delta < -NOISE), delta, half)

    return judge


def co_scaling(results: Results) -> Finding:
    """The best rate never falls as the batch grows, and is higher at the largest than at the smallest."""
    rates = [(batch, best(curve(results, "lr", batch_size=batch))[0]) for batch in sorted(results.values("batch_size"))]
    if len(rates) < 2:
        raise LookupError("fewer than two batches")
    grows = all(a <= b for (_, a), (_, b) in pairwise(rates)) and rates[0][1] < rates[-1][1]
    return Finding("best: " + ", ".join(f"{rate:g} at {batch}" for batch, rate in rates), verdict(grows))


def three_steps(results: Results) -> Finding:
    """The micro-batch from which speed no longer grows; the largest batch that costs no loss at equal tokens; and the
    gradient noise scale, in sequences."""
    batch = mode(outcome.labels["batch_size"] for outcome in some(results))
    limit = analysis.knee(curve(results, "micro_batch", y=analysis.throughput, batch_size=batch))
    ends = curve(results, "batch_size")
    if math.isinf(best(ends)[1]):
        raise LookupError("no batch trains")
    saturates = analysis.largest_within(ends, 0.02)
    finest = results.one(batch_size=batch, micro_batch=min(o.labels["micro_batch"] for o in results.outcomes))
    critical = analysis.critical_batch(finest) / configuration(finest.knobs).model.seq_len
    ours = (
        f"speed is level from micro-batch {limit:g} on, loss up to batch {saturates:g}; critical batch {critical:.3g}"
    )
    return Finding(ours, "reproduced")


def coherence(theirs: float) -> Judge:
    """Micro-batches' gradients agree at the end of training; that they do more in the beginning is an artefact."""

    def judge(results: Results) -> Finding:
        ends = []
        for outcome in some(results):
            points = analysis.series(outcome, "coherence")
            if len(points) > 1:
                ends.append((points[0][1], points[-1][1]))
        if not ends:
            raise LookupError("no run measured coherence more than once")
        first, last = max(ends)[0], min(last for _, last in ends)
        ours = f"up to {first:.3f} in the beginning, down to {last:.3f} at the end"
        return Finding(ours, "artefact" if last < min(first, theirs) else verdict(last > theirs), last - theirs)

    return judge


# Differences between variants


def compare(a: str, b: str, holds: Callable[[float], bool], doubt: Callable[[float, float | None], bool]) -> Judge:
    """How much higher the loss of variant `a` is than `b`'s, paired by seed; nothing where that is in `doubt`."""

    def judge(results: Results) -> Finding:
        found = some(results, variant=a), some(results, variant=b)
        delta, half = difference(*found)
        ours = " for ".join(nats(mean(map(loss, side))) for side in found)
        if doubt(delta, half):
            return Finding(f"{ours}: within the noise of the seeds", ELSEWHERE, delta, half)
        return Finding(ours, verdict(holds(delta)), delta, half)

    return judge


def noise(delta: float, half: float | None) -> bool:
    """Whether a difference may be the seeds'."""
    return abs(delta) <= (NOISE if half is None else half)


def worse(a: str, b: str) -> Judge:
    """`a` ends higher than `b`."""
    return compare(a, b, lambda delta: delta > 0, noise)


def alike(a: str, b: str, tolerance: float) -> Judge:
    """`a` and `b` end within `tolerance`; in doubt where the seeds' interval holds that and its contrary."""

    def doubt(delta: float, half: float | None) -> bool:
        return half is not None and abs(abs(delta) - tolerance) < half

    return compare(a, b, lambda delta: abs(delta) < tolerance, doubt)


def costs_at_most(nats_more: float, a: str, b: str, **labels: Any) -> Judge:
    """`a` ends at most so much higher than `b`, at the original's size."""

    def judge(results: Results) -> Finding:
        found = some(results, variant=a, **labels), some(results, variant=b, **labels)
        delta, half = difference(*found)
        ours = " for ".join(nats(mean(map(loss, side))) for side in found)
        return Finding(ours, at_full(results, delta <= nats_more), delta, half)

    return judge


def windowed(a: str, b: str) -> Judge:
    """Loss and speed of `a`, whose window is short, next to `b`'s, by length; `a` is faster at the longest."""

    def judge(results: Results) -> Finding:
        found = []
        for length in sorted(results.values("model.seq_len")):
            sides = [some(results, variant=name, **{"model.seq_len": length}) for name in (a, b)]
            found.append((length, *difference(*sides), speed(sides[0]) / speed(sides[1])))
        ours = ", ".join(f"{delta:+.3f}, {times:.2f} times as fast at {length}" for length, delta, _, times in found)
        _, delta, half, times = found[-1]
        return Finding(ours, at_full(results, times > 1), delta, half)

    return judge


def gap_grows(a: str, b: str) -> Judge:
    """The loss of `a` less that of `b`, mean over seeds, is larger at the end than halfway."""

    def judge(results: Results) -> Finding:
        gaps: dict[int, list[float]] = {}
        for outcome in some(results, variant=a):
            other = results.one(variant=b, seed=outcome.labels["seed"])
            difference([outcome], [other])
            for step, gap in analysis.gap_against_step(outcome, other):
                gaps.setdefault(step, []).append(gap)
        last = max(gaps, default=0)
        halfway = min((step for step in gaps if step >= last / 2), default=last)
        if halfway == last:
            raise LookupError("two evaluations of both are compared")
        before, after = mean(gaps[halfway]), mean(gaps[last])
        return Finding(
            f"{before:+.3f} at step {halfway}, {after:+.3f} at {last}", verdict(after > before), after - before
        )

    return judge


def faster(a: str, b: str, theirs: float) -> Judge:
    """How many times the speed of variant `b` is that of `a`."""

    def judge(results: Results) -> Finding:
        times = speed(some(results, variant=a)) / speed(some(results, variant=b))
        return Finding(f"{times:.2f} times", at_full(results, times >= theirs), times - theirs)

    return judge


# Norms


def states(results: Results, variant: str) -> dict[float, str]:
    """By rate, how a variant's runs ended; the first failure of several seeds."""
    ends: dict[float, str] = {}
    for outcome in sorted(some(results, variant=variant), key=lambda o: (o.labels["lr"], o.status == "finished")):
        ends.setdefault(outcome.labels["lr"], words(outcome))
    return ends


def fails_earlier(a: str, b: str) -> Judge:
    """At some rate at which `b` trains `a` diverges or becomes NaN, and never the other way round."""

    def judge(results: Results) -> Finding:
        ends, sound = states(results, a), states(results, b)
        ours = ", ".join(f"{end} at {rate:g}" for rate, end in ends.items())
        apart = [rate for rate in ends if rate in sound and (ends[rate] in FAILED) != (sound[rate] in FAILED)]
        for rate in apart:
            ours += f"; {b} {'trains' if ends[rate] in FAILED else 'fails'} at {rate:g}"
        return Finding(ours, verdict(bool(apart) and all(ends[rate] in FAILED for rate in apart)))

    return judge


def higher_at_best(a: str, b: str, theirs: float) -> Judge:
    """The loss of `a` at its best rate, as a share of `b`'s at its own; the less deep, the smaller the difference."""

    def judge(results: Results) -> Finding:
        (rate, y), (rate_b, y_b) = (best(curve(results, "lr", variant=variant)) for variant in (a, b))
        ours = f"{nats(y)} at {rate:g}, {nats(y_b)} at {rate_b:g}: {y / y_b - 1:+.1%}"
        return Finding(ours, at_full(results, y > y_b), y / y_b - theirs)

    return judge


def lower_edge(a: str, b: str) -> Judge:
    """The edge of stability of `a` is below that of `b`."""

    def judge(results: Results) -> Finding:
        edges = [analysis.edge(curve(results, "lr", variant=variant)) or math.inf for variant in (a, b)]
        return Finding(f"{a} fails from {edges[0]:g} on, {b} from {edges[1]:g}", verdict(edges[0] < edges[1]))

    return judge


def bears_high_rates(a: str, b: str) -> Judge:
    """From the edge of stability of `b` on, `a` is still below it in loss at every rate, and trains at some."""

    def judge(results: Results) -> Finding:
        points, other = dict(curve(results, "lr", variant=a)), curve(results, "lr", variant=b)
        limit = analysis.edge(other)
        if limit is None:
            return Finding(f"{b} is stable at every rate of the grid", "refuted")
        above = [(rate, points[rate], y) for rate, y in other if rate >= limit and rate in points]
        ours = ", ".join(f"{nats(y)} for {nats(y_b)} at {rate:g}" for rate, y, y_b in above)
        return Finding(ours, verdict(bool(above) and all(y < y_b for _, y, y_b in above)))

    return judge


def gradient_spread(times: float) -> Judge:
    """In the deepest model without warm-up the largest over the smallest gradient norm of a layer is so many times
    pre-norm's."""

    def judge(results: Results) -> Finding:
        some(results)
        deepest, coldest = max(results.values("model.n_layer")), min(results.values("warmup"))
        where = {"model.n_layer": deepest, "warmup": coldest}
        spreads = {}
        for place in ("post", "pre"):
            found = results.one(**where, **{"model.norm_place": place})
            if "gradient" not in found.diag:
                raise LookupError(f"no diagnostics of {place}-norm, which ended as {found.status}")
            norms = found.diag["gradient"]
            if not any(norm is not None and math.isfinite(norm) for norm in norms.values()):
                raise LookupError(f"no gradient of {place}-norm is finite")
            spreads[place] = analysis.spread(norms)
        ratio = spreads["post"] / spreads["pre"]
        ours = f"{spreads['post']:.3g} across {deepest} layers in post-norm, {spreads['pre']:.3g} in pre-norm"
        return Finding(ours, verdict(ratio >= times))

    return judge


# What a run began with, ended with, or recorded


def first_loss(results: Results, variant: str) -> tuple[float, float]:
    """Of the first step, and what guessing would give, ln V."""
    outcome = some(results, variant=variant)[0]
    if not outcome.steps:
        raise LookupError(f"{variant} ended as {outcome.status} before its first row")
    config = configuration(outcome.knobs)
    return outcome.steps[0]["loss"], math.log(config.model.vocab_size or config.data.expected_vocab_size)


def starts_high(variant: str, theirs: float) -> Judge:
    """The first loss is above twice ln V."""

    def judge(results: Results) -> Finding:
        first, chance = first_loss(results, variant)
        delta = first - theirs if results.outcomes[0].scale == "full" else None
        return Finding(f"{first:.2f}, where ln V = {chance:.2f}", verdict(first > 2 * chance), delta)

    return judge


def starts_at_chance(variant: str) -> Judge:
    """The first loss is within 2% of ln V."""

    def judge(results: Results) -> Finding:
        first, chance = first_loss(results, variant)
        return Finding(
            f"{first:.2f}, where ln V = {chance:.2f}", verdict(abs(first / chance - 1) < 0.02), first - chance
        )

    return judge


def overfits(bound: float) -> Judge:
    """The training loss ends below `bound`."""

    def judge(results: Results) -> Finding:
        outcome = some(results)[0]
        last = outcome.steps[-1]["loss"] if outcome.steps else math.inf
        return Finding(f"{last:.3f} after {outcome.final.get('step', 0)} steps", verdict(last < bound), last)

    return judge


def samples(results: Results) -> Finding:
    """The run got to its end, having written after every so many steps and then."""
    outcome = some(results)[0]
    if math.isinf(loss(outcome)):
        return Finding(outcome.status, "refuted")
    count = (outcome.final["step"] - 1) // configuration(outcome.knobs).sample_every
    return Finding(f"{count} times during training, and after it: samples.txt of its folder", verdict(count > 0))


def on_time(tolerance: float) -> Judge:
    """A run given some seconds is evaluated for the last time by then, but for a share of it, and finishes."""

    def judge(results: Results) -> Finding:
        outcome = some(results)[0]
        given = configuration(outcome.knobs).seconds
        took = max((row["seconds"] for row in (*outcome.steps, *outcome.evals)), default=math.inf)
        ours = f"{outcome.status}, training for {took:.1f} s of {given:g}"
        return Finding(ours, verdict(math.isfinite(loss(outcome)) and took <= given * (1 + tolerance)), took - given)

    return judge


def longer_is_better(results: Results) -> Finding:
    """The longest run ends lowest."""
    found = curve(results, "steps")
    if len(found) < 2:
        raise LookupError("two lengths are compared")
    ours = "; ".join(f"{nats(y)} after {steps:,}" for steps, y in found)
    return Finding(ours, verdict(best(found)[0] == found[-1][0]), found[-1][1] - found[0][1])


def traced(results: Results) -> Finding:
    """Every outcome says of which commit, machine and time it is, and of which configuration."""
    outcomes = some(results)
    known = all(o.commit and o.machine and o.started and o.knobs and o.key for o in outcomes)
    last = outcomes[-1]
    ours = f"{len(outcomes)} of commit {last.commit} on {last.machine}, {last.started[:10]}"
    return Finding(f"{ours}; a rerun supersedes, and what it supersedes is kept", verdict(known))


# Optimizers and schedules


def adam_is_adamw(results: Results) -> Finding:
    """Without weight decay both end at the same loss, bit for bit."""
    adam, adamw = (results.one(variant=name, weight_decay=0.0) for name in ("adam", "adamw"))
    if {adam.status, adamw.status} != {"finished"}:
        raise LookupError(f"ended as {adam.status} and {adamw.status}")
    delta = loss(adam) - loss(adamw)
    return Finding(f"{loss(adam):.6f} and {loss(adamw):.6f}", verdict(delta == 0), delta)


def best_decay(results: Results) -> Finding:
    """The lowest loss is AdamW's without weight decay, and its lead more than noise."""
    ends = [(loss(o), o.labels["variant"], o.labels["weight_decay"]) for o in some(results)]
    ends.sort(key=lambda end: (end[0], end[1] != "adamw"))
    if len({decay for _, _, decay in ends}) < 2:
        raise LookupError("several weight decays are compared")
    y, name, decay = ends[0]
    lead = next(other for other, _, of in ends if of != decay) - y
    ours = f"{nats(y)}: {name}, {decay:g}; leads other decays by {lead:.3f}"
    return Finding(ours, verdict(decay == 0.0 and name == "adamw") if lead > NOISE else ELSEWHERE, lead)


def endpoints(results: Results) -> Finding:
    """The recorded rates of every finished run are those of its schedule, at its first row and its last."""
    checked, wrong = 0, []
    for outcome in some(results):
        if outcome.status != "finished":
            continue
        config = configuration(outcome.knobs)
        for row in (outcome.steps[0], outcome.steps[-1]):
            checked += 1
            wanted = rate_at(config, row["step"] - 1, outcome.final["step"])
            if not math.isclose(row["lr"], wanted, rel_tol=1e-9, abs_tol=1e-15):
                wrong.append(f"{outcome.labels['variant']}: {row['lr']:.3g} at step {row['step']}")
    if not checked:
        raise LookupError("no run finished")
    return Finding("; ".join(wrong) or f"{checked} rates as scheduled", verdict(not wrong))


def rate_at(config: train.Config, step: int, steps: int) -> float:
    """The rate of AdamW after `step` of `steps`: linear from 0 over the warm-up, then by the schedule."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step < warmup:
        return config.lr * step / warmup
    left = (steps - step) / (steps - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.schedule]
    return config.lr * (shape if config.schedule == "constant" else config.final_lr + (1 - config.final_lr) * shape)


def warmup_too_long(variant: str) -> Judge:
    """Where warm-up is all there is, another schedule of the same peak ends lower."""

    def judge(results: Results) -> Finding:
        ends = {o.labels["variant"]: loss(o) for o in some(results, lr=some(results)[0].labels["lr"])}
        if variant not in ends or len(ends) < 2:
            raise LookupError(f"{variant} and others are compared")
        mine = ends.pop(variant)
        other = min(ends, key=ends.__getitem__)
        delta = mine - ends[other]
        return Finding(f"{nats(mine)}; {nats(ends[other])} with {other}", at_full(results, delta > NOISE), delta)

    return judge


# Sizes


def cost(outcome: Outcome) -> float:
    """FLOPs a token, by which sizes are ordered."""
    return outcome.final.get("flops_per_token", 0)


def by_size(results: Results) -> list[Outcome]:
    """Finished runs, the smallest model first. Raises `LookupError` where there are fewer than two."""
    found = sorted((o for o in some(results) if math.isfinite(loss(o))), key=cost)
    if len(found) < 2:
        raise LookupError("fewer than two sizes finished")
    return found


def best_size(results: Results) -> Finding:
    """Which size ends lowest; that it is neither the smallest nor the largest shows at the original's size only."""
    found = by_size(results)
    lowest = min(found, key=loss)
    ours = f"{nats(loss(lowest))}: {lowest.labels['model.d_model']} wide, {lowest.labels['model.n_layer']} layers"
    return Finding(ours, at_full(results, lowest not in (found[0], found[-1])))


def larger_is_better(results: Results) -> Finding:
    """Every size ends below the one before it."""
    found = by_size(results)
    ours = ", ".join(f"{nats(loss(o))} at {cost(o) / 1e6:,.3g} MFLOP a token" for o in found)
    return Finding(ours, verdict(all(loss(b) < loss(a) for a, b in pairwise(found))))


# Targets that are the inputs


def leak(results: Results) -> Finding:
    """Every change is learnt to less than half of its honest loss where the targets are the inputs."""
    pairs = {}
    for variant in results.values("variant"):
        ends = {o.labels["data.shift"]: loss(o) for o in results.where(variant=variant)}
        if len(ends) == 2:
            pairs[variant] = ends[0], ends[1]
    if not pairs:
        raise LookupError("no change was run with and without the leak")
    ours = ", ".join(f"{name} {leaky:.3f} (honest {nats(honest)})" for name, (leaky, honest) in pairs.items())
    return Finding(ours, "artefact" if all(a < b / 2 for a, b in pairs.values()) else "refuted")


def honest(a: str, b: str) -> Judge:
    """By how much `a` is below `b` where targets follow."""

    def judge(results: Results) -> Finding:
        found = [results.where(variant=name, **{"data.shift": 1}) for name in (a, b)]
        delta, half = difference(*found)
        ours = " for ".join(nats(mean(map(loss, side))) for side in found) + " with targets that follow"
        return Finding(ours, at_full(results, delta < -NOISE), delta, half)

    return judge


def nested(results: Results) -> Finding:
    """What twelve times the parameters gain with the leak, and what is left of that with targets that follow."""
    small, large = (pick(o.labels["model.d_ff"] for o in some(results)) for pick in (min, max))
    gains, ends = [], []
    for shift in (0, 1):
        few, many = (loss(results.one(**{"data.shift": shift, "model.d_ff": width})) for width in (small, large))
        gains.append(few - many)
        ends.append(f"{nats(many)} for {nats(few)}")
    ours = f"{ends[0]} with the leak, {ends[1]} with targets that follow"
    leaky = loss(results.one(**{"data.shift": 0, "model.d_ff": large})) < 0.5
    return Finding(ours, "artefact" if leaky else "refuted", gains[1])


# Memory, and the cost of watching


def frontier(theirs: int) -> Judge:
    """The largest micro-batch of every configuration; the original's card had 40 GB."""

    def judge(results: Results) -> Finding:
        found = {name: memory.largest(results, name) for name in results.values("configuration")}
        ours = ", ".join(f"{size} {name}" for name, size in found.items())
        return Finding(ours, at_full(results, max(found.values(), default=0) >= theirs))

    return judge


def recompute_saves(results: Results) -> Finding:
    """At one micro-batch memory falls as the share of layers computed again grows."""
    shares = {0.0: "sdpa"}
    shares |= {float(n.split()[1]): n for n in results.values("configuration") if n.startswith("recompute ")}
    sizes = {share: {n: size for n, size, _ in memory.points(results, shares[share])} for share in sorted(shares)}
    common = set.intersection(*(set(of) for of in sizes.values()))
    if len(sizes) < 2 or not common:
        raise LookupError("no micro-batch was measured with and without recomputing")
    at = max(common)
    found = [(share, of[at]) for share, of in sizes.items()]
    ours = ", ".join(f"{memory.readable(size)} at {share:g}" for share, size in found)
    return Finding(f"micro-batch {at}: {ours}", verdict(all(b < a for (_, a), (_, b) in pairwise(found))))


def repeats(tolerance: float) -> Judge:
    """The speed of every configuration at its largest micro-batch is the same when measured again."""

    def judge(results: Results) -> Finding:
        found = {name: memory.speeds(results, name) for name in results.values("configuration")}
        spreads = {name: max(of) / min(of) - 1 for name, of in found.items() if len(of) > 1}
        if not spreads:
            raise LookupError("no configuration was timed twice")
        fastest = max(spreads, key=lambda name: mean(found[name]))
        ours = f"{mean(found[fastest]):,.0f} tok/s with {fastest}; within {max(spreads.values()):.1%} on repeat"
        return Finding(ours, at_full(results, max(spreads.values()) <= tolerance))

    return judge


KINDS = ("gradient", "parameter", "update", "ratio", "snr", "activation", "entropy")


def _finite(diag: dict[str, float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in diag.values())


def watched(results: Results) -> Finding:
    """The record has every kind of diagnostics, and a finite number for each of its groups or layers."""
    recorded = [outcome.diag for outcome in some(results) if outcome.diag]
    if not recorded:
        raise LookupError("no run recorded diagnostics")
    lacking = [kind for kind in KINDS if not all(diag.get(kind) and _finite(diag[kind]) for diag in recorded)]
    ours = f"lacks {', '.join(lacking)}" if lacking else ", ".join(f"{len(recorded[0][k])} {k}" for k in KINDS)
    return Finding(ours, verdict(not lacking))


def free(a: str, b: str) -> Judge:
    """A run watched trains bit for bit as one that is not, and costs at most 1%."""

    def judge(results: Results) -> Finding:
        watching, blind = results.one(variant=a), results.one(variant=b)
        delta = loss(watching) - loss(blind)
        share = watching.final["tok_s_wall"] / blind.final["tok_s_wall"] - 1
        ours = f"loss {delta:+g}; speed {share:+.1%}"
        if delta:
            return Finding(ours, "refuted", delta)
        return Finding(ours, at_full(results, share >= -0.01), share)

    return judge
