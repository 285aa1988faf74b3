"""The server's side of a run: from checked settings to a finished run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import MetricRecord
from flwr.serverapp import Grid
from transformers import PreTrainedTokenizerFast

from fomoe_flwr import costs, report
from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.data.inventory import keep_inventory
from fomoe_flwr.data.source import evaluation_blocks, prepare_tokenizer
from fomoe_flwr.data.summary import summarise_text
from fomoe_flwr.data.tokenizer import (
    load_tokenizer,
    token_byte_lengths,
    tokenizer_digest,
    tokenizer_json,
)
from fomoe_flwr.data.tokens import heldout_windows
from fomoe_flwr.errors import InputError, RunError, reason_of, refusal
from fomoe_flwr.events import tell
from fomoe_flwr.federation.lookout import Lookout
from fomoe_flwr.federation.mapped_arrays import arrays_in
from fomoe_flwr.federation.round_record import RoundRecord, evaluation_row
from fomoe_flwr.federation.routing_log import RoutingLog
from fomoe_flwr.federation.seats import RunIdentity
from fomoe_flwr.federation.server_state import ServerState
from fomoe_flwr.federation.strategy import FoMoEStrategy
from fomoe_flwr.files import check_folder, keep_newest, replace_file, replace_folder, save_text
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.run.assembled import AssembledModel
from fomoe_flwr.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_latest,
    stored_rounds,
)
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.evaluation import EvalReport, unigram_entropy
from fomoe_flwr.run.export import assemble, export_model
from fomoe_flwr.run.generation import first_generation, kept_generation
from fomoe_flwr.run.heartbeat import Heartbeat
from fomoe_flwr.run.memory import AnonymousPeak
from fomoe_flwr.run.model_card import model_card
from fomoe_flwr.run.phases import Phases
from fomoe_flwr.run.tracking import Tracker
from fomoe_flwr.run.turnout import turnout
from fomoe_flwr.worker.device import check_device
from fomoe_flwr.worker.state_store import STATES

_STATE_KEYS = {"run_key", "spec_digest", "totals", "memory"}
"""What `state.json` of a checkpoint must hold for a run to go on from it."""


class Server:
    """One run on the server: owns the global model and the run directory.

    `heartbeat` is the hold on that directory, which the caller has taken. The run's time counts
    from `began` (Unix seconds), or from now.
    """

    def __init__(
        self, settings: Settings, heartbeat: Heartbeat, began: float | None = None
    ) -> None:
        self.settings = settings
        self.run = RunDirectory(Path(settings.output_dir))
        self.heartbeat = heartbeat
        self.phases = Phases(began)
        self.phases.end("import")
        self.seconds: dict[str, float] = {}
        """Of the phases before the first round and after the last, for the summary."""
        check_device("eval.device", settings.eval.device)  # Only here is it this machine's.
        keep_inventory(self.run.text, settings.data, resumed=bool(settings.resume))
        self.tokenizer: PreTrainedTokenizerFast = (
            load_tokenizer(self.run.tokenizer) if settings.resume else prepare_tokenizer(settings)
        )
        json_text = tokenizer_json(self.tokenizer)
        self.phases.end("text")
        config = transformers_config(settings.model, settings.data.sequence_length)
        self.spec = StateSpec.of(settings.model, config)
        checkpoint = self._checkpoint() if settings.resume else None
        self.state = ServerState(settings, config, self.spec, self.run, checkpoint)
        self.phases.end("model")
        blocks = evaluation_blocks(settings, json_text)
        self.assembled = AssembledModel(settings, config, self.state.model, self.state.weights)
        self.blocks = blocks
        self.windows = heldout_windows(blocks, settings.eval.max_tokens)
        self.byte_lengths = token_byte_lengths(self.tokenizer, settings.model.vocab_size)
        self.phases.end("text")
        self.totals: dict[str, Any] = {"comm/bytes_up": 0, "comm/bytes_down": 0, "tokens": 0}
        self.rounds_done = 0
        self.run_key = uuid4().hex
        strategy_state: Mapping[str, Any] | None = None
        if checkpoint is not None:
            strategy_state = self._resume(checkpoint)
        else:
            replace_folder(self.run.tokenizer, self._write_tokenizer)
        self._save_config()
        self.identity = RunIdentity(self.run_key, json_text, tokenizer_digest(json_text))
        self.tracker = Tracker(self.run, settings)
        self.live = report.LiveReport(self.run)
        self.routing = RoutingLog(settings, self.spec, blocks)
        self.memory = AnonymousPeak()
        self.strategy = FoMoEStrategy(
            settings,
            self.spec,
            self.state.weights,
            self.state.outer,
            self.identity,
            self._close_round,
            first_round=self.rounds_done + 1,
            keep_rounds=lambda: stored_rounds(self.run.checkpoints),
            probe=self.routing.probe,
        )
        if strategy_state is not None:
            self.strategy.load_state_dict(strategy_state)
        self.lookout = Lookout(self.strategy)
        self.phases.end("model")

    def serve(self, grid: Grid) -> None:
        """Train all rounds, then export, plot and print. Exceptions leave `status: failed`."""
        try:
            layout = self.strategy.layouts.expected(self.rounds_done + 1)
            text = summarise_text(self.settings.data, self.identity.tokenizer_json)
            self.phases.end("text")
            report.print_start(self.settings, self.run, layout, text, self.state.choice)
            self._write_summary("running")
            self.phases.end("note")
            if self.rounds_done == 0:
                self._evaluate_start()
            self.phases.end("eval")
            if not stored_rounds(self.run.checkpoints):
                # So that the run can be resumed if it ends in round 1.
                self._save(None)
            self.phases.end("checkpoint")
            self.routing.begin(self.assembled.choices)
            self.phases.end("routing")
            self.heartbeat.awaited = self.lookout
            self.heartbeat.note("train", self.rounds_done + 1)
            with arrays_in(self.state.home):
                self.strategy.start(grid)
            self.heartbeat.awaited = list
            self.heartbeat.note("export", self.rounds_done)
            self._finish()
        except BaseException as error:
            self._write_summary("failed", {"error": reason_of(error)})
            if isinstance(error, Exception):
                self.live.finish()
            raise
        finally:
            self.memory.close()
            self.tracker.close()
            tell("run_directory", f"run directory: {self.run.path}", path=str(self.run.path))

    def _write_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        first_generation(self.settings, self.tokenizer).save_pretrained(folder)

    def _save_config(self) -> None:
        """Write down the settings; a resume may have given the run more rounds."""
        replace_file(self.run.config, replace(self.settings, resume="").save)

    def _evaluate_start(self) -> None:
        """Measure the untrained model, and the best loss that a model without context can have."""
        before = self._evaluate()
        entropy = unigram_entropy(self.blocks, self.windows, self.settings.model.vocab_size)
        self.totals["eval/loss_untrained"] = before.loss
        self.totals["eval/unigram_entropy"] = entropy
        report.print_before(before, entropy)

    def _evaluate(self) -> EvalReport:
        return self.assembled.evaluate(self.blocks, self.windows, self.byte_lengths)

    def _close_round(self, record: RoundRecord) -> MetricRecord | None:
        """Evaluate, save and write down a round that the strategy has finished."""
        settings, server_round = self.settings, record.server_round
        is_last = server_round == settings.rounds
        row, phases = record.metrics_row(), self.phases
        for phase, at in record.phases():
            phases.end(phase, at)
            if not self.seconds and phase == "gather":
                self._keep_seconds("start")
        phases.end("other")
        with self.assembled.kept():
            phases.end("eval")
            means, tables = self.routing.close(record, self.assembled.choices, self.state.weights)
            row |= means
            phases.end("routing")
            if server_round % settings.eval.every == 0 or is_last:
                self.heartbeat.note("evaluate", server_round)
                row |= evaluation_row(self._evaluate())
                phases.end("eval")
                self._sample(server_round)
                phases.end("sample")
        self.rounds_done = server_round
        for key in ("comm/bytes_up", "comm/bytes_down"):
            self.totals[key] += row[key]
        self.totals["tokens"] += row["train/tokens"]
        row["tokens"] = self.totals["tokens"]
        if "privacy/epsilon" in row:
            self.totals["privacy/epsilon"] = row["privacy/epsilon"]
        # Written before the checkpoint. If the run ends in between, a resume removes both again.
        self.run.add_layout(server_round, record.layout.residents)
        self.run.append_routing(tables)
        phases.end("other")
        row["server/anonymous_bytes"] = self.memory.look()
        row["server/peak_bytes"] = self.memory.take()
        seconds = phases.take()
        row["round/seconds"] = sum(seconds.values())
        row["eval/seconds"] = seconds.get("eval", 0.0)
        row |= {f"round/{phase}_seconds": value for phase, value in seconds.items()}
        row["round/ended_unix_seconds"] = time.time()
        if settings.has_checkpoint(server_round):
            self.heartbeat.note("checkpoint", server_round)
            self._save(row)
        phases.end("checkpoint")
        row["round/checkpoint_seconds"] = phases.take()["checkpoint"]
        row["round/seconds"] += row["round/checkpoint_seconds"]
        spent = row["round/local_seconds"] / settings.layout.num_workers
        row["round/utilisation"] = spent / max(row["round/seconds"], 1e-9)
        self.tracker.log(row)
        self._write_summary("running")
        self.heartbeat.note("train", min(server_round + 1, settings.rounds))
        report.print_round(row, settings.rounds)
        self.live.refresh()
        self.lookout.close_round(record)
        phases.end("note")
        return MetricRecord({k: v for k, v in row.items() if isinstance(v, int | float)})

    def _sample(self, server_round: int) -> None:
        if self.settings.eval.sample_tokens:
            text = self.assembled.sample(self.tokenizer)
            self.run.samples.mkdir(exist_ok=True)
            save_text(text + "\n", self.run.samples / f"round-{server_round:06d}.txt")
            keep_newest(self.run.samples, "round-*.txt", self.settings.eval.keep_samples)

    def _save(self, row: Mapping[str, Any] | None) -> None:
        state = {
            "run_key": self.run_key,
            "spec_digest": self.spec.digest(),
            "totals": self.totals,
            # The name on the disk: checkpoints of earlier versions have it, and must resume.
            "memory": self.strategy.state_dict(),
            "row": row,
        }
        # What workers of this process write beside us: a resume needs both.
        STATES.settle()
        self.state.save(self.rounds_done, state)

    def _checkpoint(self) -> Checkpoint:
        """Open the newest checkpoint, which must be one of this run."""
        checkpoint = load_latest(self.run.checkpoints)
        if lacking := sorted(_STATE_KEYS - checkpoint.state.keys()):
            raise CheckpointError(
                f"checkpoint of round {checkpoint.server_round} in {self.run.path} has no "
                f"{lacking[0]}: its state.json is damaged"
            )
        if checkpoint.state["spec_digest"] != self.spec.digest():
            raise CheckpointError(
                f"checkpoint of round {checkpoint.server_round} in {self.run.path} belongs to "
                "another model shape or routing mode"
            )
        if checkpoint.server_round > self.settings.rounds:
            raise SettingsError(
                f"rounds={self.settings.rounds} but {self.run.path} has done "
                f"{checkpoint.server_round}: resume it with rounds >= {checkpoint.server_round}"
            )
        return checkpoint

    def _resume(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Go on from a checkpoint; return the state of the strategy."""
        self.rounds_done = checkpoint.server_round
        self.totals = dict(checkpoint.state["totals"])
        self.run_key = str(checkpoint.state["run_key"])
        self.run.forget_rounds_after(self.rounds_done)
        rows = self.run.read_metrics()
        if self.rounds_done and (not rows or rows[-1]["round"] != self.rounds_done):
            # The run was killed between its checkpoint and its line.
            self.run.append_metrics(checkpoint.state["row"])
        strategy_state: Mapping[str, Any] = checkpoint.state["memory"]
        return strategy_state

    def _finish(self) -> None:
        try:
            check_folder(self.run.export, "the run's")
            generation = kept_generation(self.run.tokenizer, self.tokenizer)
            exported = assemble(self.settings, self.state.weights, generation)
            rows, facts = self.run.read_metrics(), report.environment()
            card = model_card(self.settings, self.rounds_done, rows, facts)
            export_model(exported, self.tokenizer, self.run.export, card, self.state.shard)
        except InputError as error:
            print(f"not exported: {error}, with fomoe export {self.run.path} --to", flush=True)
        self.phases.end("export")
        self._write_summary("completed")
        self.heartbeat.note("report", self.rounds_done)
        self.live.finish()
        self.phases.end("report")
        report.print_end(self.run)
        self.phases.end("note")
        self._keep_seconds("end")
        self._write_summary("completed", {"run/seconds": time.monotonic() - self.phases.began})

    def _keep_seconds(self, when: str) -> None:
        self.seconds |= {f"{when}/{p}_seconds": s for p, s in self.phases.take().items()}

    def _write_summary(self, status: str, extra: Mapping[str, Any] | None = None) -> None:
        rounds = self.run.read_metrics()
        rows = [row for row in rounds if "eval/loss" in row]
        first = self.totals.get("eval/loss_untrained")
        predicted = costs.summary(self.settings)
        self.run.write_summary(
            {
                "status": status,
                "rounds_done": self.rounds_done,
                "rounds": self.settings.rounds,
                "eval/loss": {
                    "untrained": first,
                    "first": rows[0]["eval/loss"] if rows else None,
                    "last": rows[-1]["eval/loss"] if rows else None,
                },
                **self.totals,
                **self.seconds,
                "workers": [
                    asdict(each) for each in turnout(rounds, self.settings.layout.num_workers)
                ],
                **{k: v for k, v in predicted.items() if k.startswith(("params/", "ratio/"))},
                **report.environment(),
                **(extra or {}),
            }
        )


def serve(
    settings: Settings, make_grid: Callable[[RunDirectory], Grid], began: float | None = None
) -> bool:
    """Hold the run directory and train; return True, or raise what stopped it.

    The run's time counts from `began` (Unix seconds), or from now.
    """
    run = RunDirectory(Path(settings.output_dir))
    try:
        with Heartbeat(run.heartbeat) as heartbeat:
            server = Server(settings, heartbeat, began)
            server.serve(make_grid(run))
    except OSError as error:
        has_more = stored_rounds(run.checkpoints)
        way_on = f"go on with fomoe run resume={run.path}" if has_more else "start it again"
        raise RunError(f"the run stopped at {refusal(error)}; then {way_on}") from error
    return server.rounds_done == settings.rounds
