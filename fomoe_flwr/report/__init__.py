"""What people see of a run or a sweep: lines on the console, and a page that stands alone.

`console` prints while a run goes and when it ends. `history` reads a run directory. `curves`,
`timeline`, `routing`, `holders` and `baselines` draw from it, each one kind of picture. `run_page`
puts the pictures into one HTML file, and `live` keeps that file up to date.
"""

from fomoe_flwr.report.console import print_before, print_end, print_round, print_start
from fomoe_flwr.report.environment import environment
from fomoe_flwr.report.live import LiveReport, write_report
