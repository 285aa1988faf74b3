"""The layout: which worker holds which experts, layer by layer (paper section 3.2, algorithm 1).

A layout depends on settings, seed, round and what was measured (`LayoutContext`), and on nothing
else. So every party that knows those four draws the same one. Every expert of every layer has
exactly `overlap` holders; in an `explicit` layout it has at least one. Every worker holds the same
number of experts in every layer, or the number that `layout.residents` or its memory says. Where
workers are away, `settle` returns the layout of those who are there. Pure: standard library and the
settings.
"""

from fomoe_flwr.layout.balance import load_lower_bound, worker_loads
from fomoe_flwr.layout.context import MOVING_KINDS, LayoutContext, begins_period
from fomoe_flwr.layout.draw import check_layout, draw_layout
from fomoe_flwr.layout.presence import settle
from fomoe_flwr.layout.rehoming import Rehomed, rehome
from fomoe_flwr.layout.table import Layout
