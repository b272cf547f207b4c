"""Loading the state of SGD, AdamW, ZENITH or ZENITHAdamW into another of them."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ._base import HISTORY_KEY, ZenithOptimizer, kind_of_state, take_history

__all__ = ["accept_other_states", "loadable"]


def accept_other_states(optimizer: Optimizer) -> None:
    """Lets ``optimizer.load_state_dict()`` take what another of SGD, AdamW, ZENITH and ZENITHAdamW has saved, by a hook
    of torch's: a run goes on with another optimizer, whatever reads its checkpoint.

    ZENITH and ZENITHAdamW do so by themselves; nothing changes for optimizers of other classes.
    """
    if kind_of_state(optimizer.param_groups) and not isinstance(optimizer, ZenithOptimizer):
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: loadable(state, optimizer))


def loadable(state_dict: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """What ``optimizer``, one of torch's, can go on from of a state that may be of another class.

    Of its own kind (SGD and ZENITH, AdamW and ZENITHAdamW) everything both have is the state's, and what only
    ``optimizer`` has stays. Of the other kind no option and no momentum is: an LR or a decay of one is none for the
    other.

    Args:
        state_dict: any optimizer's; left as it is.
        optimizer: the one to load it.

    Returns:
        Another dictionary, for ``optimizer.load_state_dict()``.
    """
    own_groups, groups = optimizer.param_groups, state_dict["param_groups"]
    kind, own_kind = kind_of_state(groups), kind_of_state(own_groups)
    if len(own_groups) != len(groups) or kind is None:
        return state_dict  # torch says what is wrong
    options = [{name: value for name, value in group.items() if name != "params"} for group in own_groups]
    state = state_dict["state"]
    if kind == own_kind:
        merged = [{**own, **group} for own, group in zip(options, groups)]
    else:
        merged = [
            {**own, **_history_in(group), "params": group["params"]} for own, group in zip(options, groups)
        ]
        params = {key for group in groups for key in group["params"]}
        state = {key: value for key, value in state.items() if key not in params}
    return {**state_dict, "state": state, "param_groups": merged}


def _history_in(group: dict[str, Any]) -> dict[str, Any]:
    group = dict(group)
    history = take_history([group])
    return {} if history is None else {HISTORY_KEY: history}
