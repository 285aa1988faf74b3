"""The planner: from sites and a model to workers, overlap, layout and local steps.

It minimises the time to a token budget within the memory of the sites. It cannot know how well a
choice trains. Quality enters only through bounds, whose defaults come from the paper's tables.
Pure: no torch, no Flower.
"""

from fomoe_flwr.plan.candidate import Candidate, Unfit, fit
from fomoe_flwr.plan.document import (
    MARK,
    plan_json,
    plan_overrides,
    plan_toml,
    plan_yaml,
    show_plan,
)
from fomoe_flwr.plan.search import Alternative, Bounds, Plan, default_overlap, make_plan
from fomoe_flwr.plan.sites import NamedSite, Sites, read_sites
