"""`train.py --plan` on standard output: what is known at once, what had to be measured when it is.

>>> show_plan("story-small", config, None, "here")
"""

from __future__ import annotations

from pathlib import Path

from config import Config
from training.console import Console, duration
from training.plan import Outline, Plan, completed, gigabytes, outline


def show_plan(preset: str, config: Config, data: Path | None, target: str, price_per_hour: float = 0.0) -> None:
    """Work a plan out and print it. Arguments as of `plan.make_plan`; price_per_hour: in any currency, 0 leaves the cost out.

    Raises ConfigError if the run cannot fit.
    """
    known = outline(preset, config, data, target)
    print_outline(known)
    if known.machine.gpu:
        print_costs(completed(known), price_per_hour)
        return
    over = Console().waiting("measuring a few steps on this machine")
    try:
        plan = completed(known)
    finally:
        over()
    print_costs(plan, price_per_hour)


def print_outline(plan: Outline) -> None:
    """Model, machine, batch and amount of text."""
    machine, tokens = plan.machine, plan.steps * plan.tokens_per_step
    print(f"{plan.preset}: {plan.config.description}")
    for name, count, size in plan.parts:
        print(f"  {name:<20} {count:>13,} parameters {size / 1e6:>9.1f} MB")
    if machine.warning:
        print(f"note: {machine.warning}")
    print(
        f"on {machine.label}, {machine.precision}: micro-batch {plan.batch_size} x {plan.grad_accum_steps} accumulated = "
        f"{plan.tokens_per_step:,} tokens a step"
    )
    room, estimate = gigabytes(machine.memory), gigabytes(plan.estimated_bytes)
    print(f"memory: about {estimate} of {room} {'per GPU' if machine.gpu else 'free'}")
    if plan.steps:
        passes = f" = {tokens / plan.corpus:.1f} passes over {plan.corpus:,} tokens" if plan.corpus else ""
        print(f"length: {plan.steps:,} steps, {tokens:,} tokens{passes}")
    if not plan.corpus:
        passes = f"the {plan.config.train.epochs:g} passes over them" if plan.config.train.epochs else "passes"
        print(f"note: no prepared texts in {plan.data} yet, so {passes} are not counted")
    print(end="", flush=True)


def print_costs(plan: Plan, price_per_hour: float) -> None:
    """Memory, speed, time and price."""
    costs, train = plan.costs, plan.config.train
    if costs.peak_bytes is not None:
        estimate, room = gigabytes(plan.estimated_bytes), gigabytes(plan.machine.memory)
        print(f"memory: {gigabytes(costs.peak_bytes)} measured of {room} free (estimated {estimate})")
    print(f"speed: {plan.tokens_per_s:,.0f} tokens/s ({plan.basis})")
    if not plan.steps and train.max_minutes:
        tokens = plan.tokens_per_s * train.max_minutes * 60
        print(f"time limit: {train.max_minutes:g} minutes, about {tokens:,.0f} tokens")
        return
    if not plan.steps:
        seconds = train.epochs * 1e6 / plan.tokens_per_s
        print(f"time: {duration(seconds)} for each million tokens of text (some 4 MB), read {train.epochs:g} times")
        return
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan.non_training_s.items() if seconds >= 1)
    including = f" (including {parts})" if parts else ""
    print(f"time: {duration(plan.total_s)} for {plan.steps:,} steps{including}")
    if train.max_minutes and plan.total_s > train.max_minutes * 60:
        done = train.max_minutes * 60 / plan.total_s
        print(f"note: --train.max-minutes {train.max_minutes:g} ends it after {done:.0%} of that")
    if price_per_hour:
        print(f"cost: {plan.total_s / 3600 * price_per_hour:,.2f} at {price_per_hour:g} an hour")
