"""hooks: what happens inside a looped model, and where.

    from hooks import HookedLoopMDM

    model = HookedLoopMDM.from_pretrained("zoo/automaton-loop")
    logits, rec = model.run_with_cache(tokens, n_loops=8)
    rec["blocks.2.hook_resid_post@3"]
"""

from hooks.contract import LoopedModel, Unavailable
from hooks.foreign.adopt import adopt
from hooks.foreign.discovery import describe
from hooks.foreign.loopify import loopify
from hooks.foreign.schedules import InLoopsOf, Schedule, UpTo
from hooks.foreign.watching import watch
from hooks.hook_points import HookPoint
from hooks.model.config import LoopMDMConfig
from hooks.model.hooked import HookedLoopMDM
from hooks.model.loopmdm import AdaptiveOutput, LoopMDM
from hooks.recording import Recording
from hooks.sites import Site, SiteError, SiteSpace
from hooks.topology import Topology

__all__ = ["AdaptiveOutput", "HookPoint", "HookedLoopMDM", "InLoopsOf", "LoopMDM", "LoopMDMConfig", "LoopedModel",
           "Recording", "Schedule", "Site", "SiteError", "SiteSpace", "Topology", "Unavailable", "UpTo", "adopt",
           "describe", "loopify", "watch"]
