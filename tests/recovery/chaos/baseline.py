"""The oracle of `--deterministic`: what this very deployment answers while nothing disturbs it, to be met to the bit.

Used by the campaign in place of oracle.py, whose float32 sums are in another order.
"""

from __future__ import annotations

from tests.recovery.chaos.cases import CASES, HTTP, ZMQ, Case
from tests.recovery.chaos.history import Expected, Oracle, Request
from tests.recovery.chaos.load import Load


async def take(load: Load) -> Oracle:
    """Asks each case once, alone. Raises RuntimeError if one is not answered."""
    oracle: Oracle = {}
    for case in CASES:
        answers = {via: await load.ask_once(case, via) for via in case.via}
        for via, request in answers.items():
            if len(request.ends) != case.num_choices:
                raise RuntimeError(f"{case.name} over {via}: {request.error or request.refused}")
        oracle[case.name] = [_expected(case, answers, choice) for choice in range(case.num_choices)]
    return oracle


def _expected(case: Case, answers: dict[str, Request], choice: int) -> Expected:
    text = "".join(
        str(delivery.content) for delivery in answers[HTTP].deliveries if delivery.choice == choice
    )
    if ZMQ in answers:
        tokens = [token for delivery in answers[ZMQ].deliveries for token in delivery.content]
    else:  # seen as text only; of the tokens the number counts
        tokens = [0] * ((answers[HTTP].completion_tokens or 0) // case.num_choices)
    reason = next(end.reason for end in answers[HTTP].ends if end.choice == choice)
    return Expected(
        [int(token) for token in tokens], [1.0] * len(tokens), text, [len(text)] * len(tokens), reason
    )
