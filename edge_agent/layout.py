"""Pure: where everything lies on the device's disk. It computes paths and touches none of them.

state_dir/
  trust/          TUF metadata, the operators' keys, one copy of each floor
  floor/          the other copy of each floor: what never sinks, see update/levels.py
  staging/        downloads under way (same filesystem as the store)
  store/DIGEST/   one version, immutable: manifest.json and its files
  prepared/DIGEST/KEY/  this device's own form of a version's model, made by preflight, dropped with it
  models/NAME/    current, previous → ../../store/DIGEST (symlinks)
  journal/        NAME.json: where an update is
  verified/       DIGEST.json: as which files a version had its digests, see verified.py
  desired.json    the newest accepted desired state
  inbox/          what `edge-agent import` has for the control process
  outbox.db       what waits for the controller
  *.damaged-N     set aside, here or beside what took its place; of each name the newest two
run_dir/
  control.sock    repository and statistics, for the control process
  inference.sock  clients
  starts/         NAME.json: the start counter while state_dir takes nothing
  metered         while it is there, downloads are kept small ([registry] metered)
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.config import Config

MANIFEST = "manifest.json"


class Layout:
    """All paths of one agent."""

    def __init__(self, config: Config) -> None:
        self.state = Path(config.state_dir)
        self.run = Path(config.run_dir)
        self.trust = self.state / "trust"
        self.floor = self.state / "floor"
        self.staging = self.state / "staging"
        self.store = self.state / "store"
        self.prepared = self.state / "prepared"
        self.models = self.state / "models"
        self.journal = self.state / "journal"
        self.records = self.state / "verified"
        self.starts = self.state / "starts"
        self.spare_starts = self.run / "starts"
        self.desired = self.state / "desired.json"
        self.rejected = self.state / "rejected.json"
        self.session = self.state / "session.json"
        self.inbox = self.state / "inbox"
        self.outbox = self.state / "outbox.db"
        self.control_lock = self.state / "control.lock"
        self.up_lock = self.run / "up.lock"
        self.metered = self.run / "metered"
        self.control_socket = self.run / "control.sock"
        self.inference_socket = (
            Path(config.serving.socket) if config.serving.socket else self.run / "inference.sock"
        )

    def version(self, digest: str) -> Path:
        """The store folder of one version."""
        return self.store / digest

    def verified(self, digest: str) -> Path:
        """As which files a version was verified."""
        return self.records / f"{digest}.json"

    def current(self, name: str) -> Path:
        """The symlink that says what a model serves."""
        return self.models / name / "current"

    def previous(self, name: str) -> Path:
        """The symlink to the version before."""
        return self.models / name / "previous"

    def floor_copies(self, name: str) -> tuple[Path, Path]:
        """Two places for one floor, in different folders, so that the loss of one folder loses nothing."""
        return self.trust / f"{name}.floor", self.floor / f"{name}.floor"

    def journal_file(self, name: str) -> Path:
        """Where the update of one model is."""
        return self.journal / f"{name}.json"
