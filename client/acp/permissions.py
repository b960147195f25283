"""What an agent is answered that asks whether it may do something: nobody is there to be asked."""

from __future__ import annotations

from typing import Any, Literal

Policy = Literal["allow", "deny"]

#: Kinds of options, the best first: once, rather than for good.
KINDS = {"allow": ("allow_once", "allow_always"), "deny": ("reject_once", "reject_always")}


def answer(policy: Policy, options: Any) -> dict[str, Any]:
    """The result of ``session/request_permission``: one of ``options``, or that the question is
    withdrawn, where none of them fits."""
    offered = [x for x in options if isinstance(x, dict)] if isinstance(options, list) else []
    for kind in KINDS[policy]:
        for option in offered:
            if option.get("kind") == kind and isinstance(option.get("optionId"), str):
                return {"outcome": {"outcome": "selected", "optionId": option["optionId"]}}
    return withdrawn()


def withdrawn() -> dict[str, Any]:
    return {"outcome": {"outcome": "cancelled"}}
