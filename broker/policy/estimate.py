"""How long things take, as far as the broker has seen. Priors stand here until the first worker has been measured."""

from __future__ import annotations

from broker.state.model import Learned, Request

PRIOR_STEP_S = 0.05
PRIOR_LOAD_S = 20.0
PRIOR_QUEUE_S = 5.0
PRIOR_OVERHEAD_S = 0.5
MARGIN = 1.15  # on run times: without one, half of all predictions would be late


def blend(old: float, new: float, weight: float = 0.3) -> float:
    """A running mean in which `new` weighs `weight`; the first observation counts alone."""
    return new if not old else (1 - weight) * old + weight * new


def profiled_step_s(learned: Learned, packed: int) -> float:
    """Seconds of one step of `packed` requests, as the workers measured at warm-up."""
    if learned.profile is None:
        return PRIOR_STEP_S
    return max(1e-6, learned.profile.base_s + learned.profile.per_request_s * max(1, packed))


def step_s(learned: Learned, packed: int) -> float:
    """The same as requests really experience it, with evaluations and checkpoints."""
    return profiled_step_s(learned, packed) * (learned.stretch or 1.0)


def remaining_steps(request: Request, learned: Learned) -> float:
    """Steps still to go: what requests of the pool took on average, more for one that took that many already."""
    limit = request.spec.max_steps
    expected = learned.steps if learned.steps and request.spec.target_score is not None else limit
    if request.step >= expected:
        expected = request.step * 1.25
    return max(1.0, min(float(limit), expected) - request.step)


def remaining_s(request: Request, learned: Learned, packed: int) -> float:
    """Seconds on a warm worker whose steps `packed` requests share."""
    overhead_s = 0.0 if request.first_step_unix_s else learned.overhead_s or PRIOR_OVERHEAD_S
    return overhead_s + MARGIN * remaining_steps(request, learned) * step_s(learned, packed)


def load_s(learned: Learned) -> float:
    """From the start of an allocation's job to a warm worker."""
    return learned.load_s or PRIOR_LOAD_S


def cold_start_s(learned: Learned) -> float:
    """From the order of an allocation to a warm worker."""
    return (learned.queue_s or PRIOR_QUEUE_S) + load_s(learned)
