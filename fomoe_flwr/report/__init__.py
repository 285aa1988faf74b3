"""What people see of a run or a sweep: lines on the console, and a page that stands alone.

`console` prints while a run goes and when it ends. `history` reads a run directory, `panels` and
the modules named after pictures draw from it, `run_page` and `sweep_page` put the drawings into one
HTML file, and `live` keeps that file up to date.
"""

from fomoe_flwr.report.console import print_before, print_end, print_round, print_start
from fomoe_flwr.report.environment import environment
from fomoe_flwr.report.live import LiveReport, write_report
