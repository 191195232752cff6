"""hooks: what happens inside a looped model, and where.

    from hooks import HookedLoopMDM

    model = HookedLoopMDM.from_pretrained("zoo/automaton-loop")
    logits, rec = model.run_with_cache(tokens, n_loops=8)
    rec["blocks.2.hook_resid_post@3"]
"""

from hooks.config import LoopMDMConfig
from hooks.discovery import describe
from hooks.hook_points import HookPoint
from hooks.hooked import HookedLoopMDM
from hooks.loopify import loopify
from hooks.loopmdm import AdaptiveOutput, LoopMDM
from hooks.recording import Recording
from hooks.schedules import Schedule
from hooks.sites import Site, SiteError, SiteSpace, Topology
from hooks.watch import watch  # (at once, not lazily: the submodules watch and loopify bear their functions' names)

__all__ = ["AdaptiveOutput", "HookPoint", "HookedLoopMDM", "LoopMDM", "LoopMDMConfig", "Recording",
           "Schedule", "Site", "SiteError", "SiteSpace", "Topology", "describe", "loopify", "watch"]
