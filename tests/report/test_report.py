"""The report: a page that stands alone, tells the truth, and looks right in a browser."""

from __future__ import annotations

import json
import re
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from chromium import chromium_tab, find_chromium

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import load_settings
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.report import live, print_end
from fomoe_flwr.report.history import History
from fomoe_flwr.report.holders import held_share
from fomoe_flwr.report.live import LiveReport, write_report
from fomoe_flwr.report.timeline import _large
from fomoe_flwr.report.units import count, duration, size
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.sweep.job import JobRecord, write_record
from fomoe_flwr.sweep.pareto import choices_of, front
from fomoe_flwr.sweep.plan import plan_sweep

NASTY = "<script>alert('no')</script> & \"quotes\""


def make_run(
    path: Path, *overrides: str, rounds: int = 3, status: str = "completed", loss: float = 5.0
) -> RunDirectory:
    """Write what a run of so many rounds leaves, with made-up numbers."""
    settings = load_settings(["preset=tiny", f"rounds={max(1, rounds)}", *overrides])
    path.mkdir(parents=True)
    run = RunDirectory(path)
    settings.save(run.config)
    model = settings.model
    for number in range(1, rounds + 1):
        layout = draw_layout(settings.layout, model.num_layers, model.num_experts, 0, number)
        run.add_layout(number, layout.residents)
        run.append_metrics(
            {
                "round": number,
                "tokens": 1000 * number,
                "train/loss": loss + 1 / number,
                "eval/loss": loss + 0.5 / number,
                "eval/bits_per_byte": 4.0,
                "eval/perplexity": 100.0,
                "train/tokens_per_second": 500.0,
                "moe/ghost_fraction": 0.5,
                "comm/bytes_up": 2**20,
                "comm/bytes_down": 2**21,
                "round/seconds": 3.0,
                "round/train_seconds": 2.0,
                "round/eval_seconds": 0.5,
                "round/worker_seconds": {"0": 1.0, "1": 2.0},
                "round/workers_ok": 2,
                "round/workers_failed": int(number == 2),
            }
        )
        layers = [
            {"layer": n, "ghost_fraction": 0.5, "ghost_expected": 0.5, "load": [n + 1] * 12}
            for n in range(model.num_layers)
        ]
        run.append_routing({"round": number, "layers": layers, "workers": []})
    run.samples.mkdir()
    (run.samples / "round-000003.txt").write_text(NASTY)
    run.write_summary(
        {
            "status": status,
            "rounds": max(1, rounds),
            "rounds_done": rounds,
            "eval/loss": {"untrained": 8.0, "last": loss},
            "eval/loss_untrained": 8.0,
            "eval/unigram_entropy": 6.0,
            "tokens": 1000 * rounds,
            "comm/bytes_up": rounds * 2**20,
            "comm/bytes_down": rounds * 2**21,
            "environment/commit": "abc123",
            **({"error": NASTY} if status == "failed" else {}),
        }
    )
    return run


def make_sweep(path: Path) -> Path:
    """Write what a sweep of eight jobs leaves, one of which failed and two were skipped."""
    plan = plan_sweep(["preset=tiny", "layout.overlap=1,2,4", "seed=0,1"])
    path.mkdir()
    plan.save(path / "sweep.json")
    for number, job in enumerate(plan.jobs):
        if job.refusal:
            continue
        folder = path / "jobs" / job.name
        if number == 3:
            write_record(folder, JobRecord("failed", f"killed by SIGKILL {NASTY}", 1, 5.0))
        else:
            run = make_run(folder, *job.overrides[1:], loss=5.0 - number / 10)
            run.report.write_text("a page of its own")
            write_record(folder, JobRecord("completed", "", 1, 10.0))
    return path


def links(page: str) -> list[str]:
    """Return everything that a page would fetch or lead to."""
    return re.findall(r'(?:src|href)="([^"#][^"]*)"|@import|url\((?!#)', page)


def test_the_page_of_a_run_stands_alone_and_says_what_happened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "layout.kind=random")
    written = write_report(run)
    assert written[0] == run.report
    names = {"loss", "layout", "routing", "load", "baselines", "timeline"}
    assert {path.stem for path in written[1:]} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    page = run.report.read_text(encoding="utf-8")
    # Data URIs only: the icon that is none, and pictures inside the drawings.
    assert all(link.startswith("data:") for link in links(page))
    assert "<script" not in page
    for told in ("completed", "3 of 3", "5.1667", "9.0 MiB", "abc123", "1 failed", "skip_token"):
        assert told in page, told
    assert "&lt;script&gt;alert(&#x27;no&#x27;)" in page
    assert "http-equiv" not in page
    # Stand-in colours must all have become the page's.
    assert re.search(r"#0102[0-9a-f]{2}", page) is None
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    assert used <= set(ids)


def test_every_picture_has_a_text_in_its_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report(run)
    page = run.report.read_text(encoding="utf-8")
    pictures = re.findall(r"<svg [^>]*>", page)
    assert len(pictures) >= 8
    assert all(re.search(r'role="img" aria-label="[^"]{20,}"', tag) for tag in pictures)


@pytest.mark.parametrize(("status", "rounds"), [("running", 0), ("running", 1), ("failed", 0)])
def test_a_run_that_has_hardly_begun_has_a_page_too(
    status: str, rounds: int, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", rounds=rounds, status=status)
    write_report(run)
    page = run.report.read_text(encoding="utf-8")
    assert ('http-equiv="refresh"' in page) == (status == "running")
    assert f'class="status {status}"' in page
    assert (NASTY in page) is False


def test_drawing_takes_a_bounded_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, drawn = [0.0], []

    def draw(_: RunDirectory) -> None:
        drawn.append(clock[0])
        clock[0] += 10.0

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live, "draw_beside", draw)
    report = LiveReport(RunDirectory(tmp_path))
    while clock[0] < 2000:
        report.refresh()
        if report._drawing is not None:
            report._drawing.join()
        clock[0] += 1.0
    assert drawn[0] == 30.0
    # Ten seconds each, so at most one in two hundred.
    assert all(b - a >= 200 for a, b in pairwise(drawn))
    assert len(drawn) >= 8


def test_the_round_goes_on_while_the_report_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, drawn = threading.Event(), []

    def draw(run: RunDirectory) -> None:
        drawn.append(run.path)
        assert may_end.wait(20)

    monkeypatch.setattr(live, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(live, "draw_beside", draw)
    report = LiveReport(RunDirectory(tmp_path))
    for _ in range(3):
        report.refresh()
    assert drawn == [tmp_path]
    may_end.set()
    report.finish()
    assert drawn == [tmp_path, tmp_path]


def test_another_process_draws_the_report_of_a_run_that_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running")
    live.draw_beside(run)
    assert "3 of 3" in run.report.read_text(encoding="utf-8")
    assert (run.plots / "timeline.png").is_file()


def test_phases_too_short_to_be_seen_are_added_up() -> None:
    shown = _large({"send": 0.004, "receive": 1.0, "fold": 0.005, "other": 0.1})
    assert shown == {"receive": 1.0, "other": pytest.approx(0.109)}


def test_a_report_that_cannot_be_drawn_ends_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    LiveReport(RunDirectory(tmp_path / "nothing-here")).finish()
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line[:29] for line in told] == ["warning: no report this time:"]


@pytest.mark.parametrize(
    ("missed", "told"),
    [
        ((0, 0), ["all 2 workers counted in every round"]),
        (
            (0, 2),
            ["rounds that counted", "0 │       3 │       0 │", "1 │       1 │       2 │ late"],
        ),
    ],
)
def test_the_last_tables_say_how_many_rounds_of_each_worker_counted(
    missed: tuple[int, int], told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    workers = [
        {"worker": n, "counted": 3 - k, "missed": k, "reason": "late" * bool(k)}
        for n, k in enumerate(missed)
    ]
    run.write_summary({**run.read_summary(), "workers": workers})
    print_end(run)
    said = capsys.readouterr().out
    assert all(part in said for part in told), said


def test_series_are_sums_over_rounds(tmp_path: Path) -> None:
    history = History.read(make_run(tmp_path / "run"))
    assert history.mebibytes == [3.0, 6.0, 9.0]
    assert history.minutes == pytest.approx([0.05, 0.10, 0.15])
    assert history.heldout(history.mebibytes)[:2] == [(0.0, 8.0), (3.0, 5.5)]


def test_held_share_counts_rounds() -> None:
    first = Layout.from_json([[[0], [1]]])
    second = Layout.from_json([[[1], [0]]])
    assert held_share([first, first, first, second]).tolist() == [[[0.75, 0.25], [0.25, 0.75]]]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (2.0, 3.9), (9.0, 1.0), (0.5, 6.0), (1.0, 5.5)]
    kept = front(points)
    assert kept == [5, 0, 3, 4]
    for index, (cost, loss) in enumerate(points):
        beaten = any(
            c <= cost and other <= loss and (c, other) != (cost, loss) for c, other in points
        )
        assert (index in kept) == (not beaten)


def test_choices_take_seeds_together() -> None:
    row = {"status": "completed", "comm/bytes_up": 1, "comm/bytes_down": 2}
    rows = [
        {**row, "k": k, "seed": s, "eval/loss": loss, "memory/worker_bytes": 7}
        for k, s, loss in (("a", "0", 1.0), ("a", "1", 3.0), ("b", "0", 5.0))
    ]
    rows.append({**rows[0], "status": "failed", "eval/loss": 100.0})
    found = choices_of(rows, ["k", "seed"])
    assert [(c.label, c.losses, c.loss, c.bytes_sent) for c in found] == [
        ("a", (1.0, 3.0), 2.0, 3),
        ("b", (5.0,), 5.0, 3),
    ]


def test_the_page_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path / "sweep")
    assert main(["report", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "killed by SIGKILL" in said
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert page.count('class="status failed"') == 1
    assert "needs layout.num_workers &gt;= 4" in page
    local = [link for link in links(page) if not link.startswith("data:")]
    assert len(local) == 3
    assert all((sweep / link).is_file() for link in local)
    assert {path.name for path in (sweep / "plots").iterdir()} == {"pareto.png", "loss.png"}
    assert (sweep / "results.csv").read_text().count("\n") == 7


def test_quantities_are_readable() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [count(n) for n in (999, 1500, 2.5e9)] == ["999", "1.50k", "2.50B"]
    assert [duration(s) for s in (1.25, 600, 9000)] == ["1.2 s", "10 min", "2.5 h"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "run", "layout.kind=random", rounds=6)
    write_report(run)
    sweep = make_sweep(folder / "sweep")
    assert main(["report", str(sweep)]) == 0
    return {"run": run.report, "sweep": sweep / "report.html"}


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_browser_shows_it(
    name: str, width: int, dark: bool, pages: dict[str, Path], tmp_path: Path
) -> None:
    program = find_chromium()
    assert program is not None
    with chromium_tab(program, tmp_path) as tab:
        tab.open(pages[name].as_uri(), width, 900, dark)
        assert tab.complaints() == []
        assert tab.requests() == [pages[name].as_uri()]
        # Nothing sticks out at the side; wide tables scroll in their own frame.
        assert tab.value("document.documentElement.scrollWidth") <= width
        boxes = json.loads(
            tab.value(
                "JSON.stringify([...document.querySelectorAll('figure svg')].map(s => {"
                "const b = s.getBoundingClientRect(); return [b.left, b.right, b.height]}))"
            )
        )
        assert len(boxes) >= 4
        assert all(left >= 0 and right <= width and height > 80 for left, right, height in boxes)
        columns = len({left for left, _, _ in boxes})
        assert (columns == 1) == (width == 390)
        paper, ink = (
            sum(map(int, re.findall(r"\d+", str(tab.value(f"getComputedStyle({what}")))))
            for what in (
                "document.body).backgroundColor",
                "document.querySelector('svg text')).fill",
            )
        )
        assert (paper < ink) == dark
