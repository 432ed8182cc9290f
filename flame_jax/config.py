"""Everything configurable, as frozen dataclasses; `commandline.load` fills them in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flame_jax.feature_config import CacheConfig, DataConfig, StoreConfig, at_least, some_seconds
from flame_jax.packing import Layout
from flame_jax.schema import FeatureSchema

SMALLEST_SHARE = 0.0001
"""Of users, that a split between two versions tells apart."""
LEAST_SHARE = 1e-6
"""Of a traffic class; its inverse is the largest."""
AUTO_LANES = (1, 2, 4)
"""Lanes of a device that `dispatch.lanes` chooses among at `auto`."""


@dataclass(frozen=True)
class HeadConfig:
    """Multi-task experts and towers over a candidate's representation.

    Attributes:
        experts: experts shared by the tasks, mixed by a gate per task.
        expert_hidden: output size of an expert.
        tower_hidden: hidden size of a task's tower.
    """

    experts: int = 1
    expert_hidden: int = 64
    tower_hidden: int = 32

    def __post_init__(self) -> None:
        at_least(1, "model.head", self, "experts", "expert_hidden", "tower_hidden")


@dataclass(frozen=True)
class ClimberConfig:
    """What only Climber has.

    Attributes:
        gate_reduction: squeeze factor of the fusion's gate.
        fusion: fuse the blocks by bit-wise gating; without it they are laid side by side.
        adaptive: position and time bias and learned temperature; without it the temperature is
            sqrt(head_dim) and there is no bias.
    """

    gate_reduction: int = 4
    fusion: bool = True
    adaptive: bool = True

    def __post_init__(self) -> None:
        at_least(1, "model.climber", self, "gate_reduction")


@dataclass(frozen=True)
class HstuConfig:
    """What only HSTU has.

    Attributes:
        variant: which layer is meant; three share the name.
        value_dim: size of a head's values, dv; a head's queries and keys have model.head_dim.
        attention_divisor: the constant that attention weights are divided by.
        time_rows: rows of the input's time table (DLRMv3); 0 for none. It makes histories uncacheable.
        bias_positions: reach P of the `research` variant's position table.
        bias_buckets: rows of the `research` variant's time table.
    """

    variant: Literal["dlrm_v3", "recsys_examples", "research"] = "dlrm_v3"
    value_dim: int = 64
    attention_divisor: float = 512.0
    time_rows: int = 0
    bias_positions: int = 512
    bias_buckets: int = 129

    def __post_init__(self) -> None:
        at_least(1, "model.hstu", self, "value_dim", "bias_positions", "bias_buckets")
        at_least(0, "model.hstu", self, "time_rows")
        if not self.attention_divisor > 0:
            raise ValueError(f"model.hstu.attention_divisor must be positive, not {self.attention_divisor}")


@dataclass(frozen=True)
class ModelConfig:
    """A ranking model; docs/models.md states each architecture as formulas.

    Attributes:
        architecture: Climber (reconstruction), HSTU, or a plain transformer with the same mask.
        name: name of the model in manifests, metrics and answers.
        width: model width d.
        layers: layers (Climber: per block).
        heads: attention heads.
        head_dim: size of a head (HSTU: of its queries and keys).
        ffn: hidden size of a layer's FFN (Climber and transformer).
        position_rows: rows of the input's position table (HSTU and transformer); 0 for none.
        dtype: computing type of matrix products and activations; weights are trained in float32.
        table_dtype: type in which the embedding tables of items and side features are served.
        item_table: where the items' embedding table is kept when serving: in device memory, so that only ids
            travel, or in host memory, when it is larger than the device's; its rows then travel in the slot.
        hot_rows: rows of a table in host memory, those used most, that the device holds too: they need not be copied
            to the slot.
    """

    architecture: Literal["climber", "hstu", "transformer"] = "climber"
    name: str = "climber"
    width: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    ffn: int = 512
    position_rows: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    item_table: Literal["device", "host"] = "device"
    hot_rows: int = 0
    head: HeadConfig = HeadConfig()
    climber: ClimberConfig = ClimberConfig()
    hstu: HstuConfig = HstuConfig()

    def __post_init__(self) -> None:
        at_least(1, "model", self, "width", "layers", "heads", "head_dim", "ffn")
        at_least(0, "model", self, "position_rows", "hot_rows")
        if self.hot_rows and self.item_table != "host":
            raise ValueError("model.hot_rows are of an item table in host memory: set model.item_table to host")
        if not self.name:
            raise ValueError("model.name is empty")
        if self.item_table == "host" and self.table_dtype == "bfloat16" and self.width % 2:
            raise ValueError(f"model.width must be even for a host table in bfloat16, not {self.width}")

    @property
    def host_words(self) -> int:
        """4-byte words that the slot holds for a token's item embedding; 0 where the table is on the device."""
        if self.item_table == "device":
            return 0
        return self.width // 2 if self.table_dtype == "bfloat16" else self.width

    @property
    def caches_history(self) -> bool:
        """Whether history rows depend on events and scenario alone, so that their keys and values may be kept."""
        return not (self.architecture == "hstu" and self.hstu.time_rows)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """From what `dataclasses.asdict` made of one. Raises TypeError, KeyError or ValueError."""
        nested = {
            "head": HeadConfig(**data["head"]),
            "climber": ClimberConfig(**data["climber"]),
            "hstu": HstuConfig(**data["hstu"]),
        }
        return cls(**{**data, **nested})


@dataclass(frozen=True)
class TrainConfig:
    """Training and its evaluation.

    Attributes:
        checkpoint: folder of the checkpoint, resumed from when it exists.
        label_actions: per task, the actions that count as a positive label.
        negatives: items sampled beside each event, whose labels are 0: for logs that hold only what people took.
        negative_period: seconds; a negative is drawn by its popularity in the event's period.
        epochs: passes over the training events.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: AdamW's decay.
        dropout: dropout on token embeddings and on each layer's outputs.
        tokens: token rows of a training batch.
        candidates: candidate rows of a training batch.
        tiles_at_once: tiles of attention that training computes together; more is faster and takes more memory.
        chunk: most events scored from one history when training.
        min_history: a user's first events, never scored in training; a user with fewer gives the last one.
        test_fraction: newest share of each user's events, kept for the test.
        validation: train without the newest share of the training events as well and report on it, to
            choose settings; the test events stay untouched.
        unknown_rate: share of item ids replaced by the out-of-vocabulary row when training.
        seed: seed of initialisation and sampling.
    """

    checkpoint: str = "runs/demo/checkpoint"
    label_actions: dict[str, list[int]] = field(default_factory=lambda: {"score": [0]})
    negatives: int = 0
    negative_period: int = 604800
    epochs: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    dropout: float = 0.1
    tokens: int = 4096
    candidates: int = 1024
    tiles_at_once: int = 16
    chunk: int = 32
    min_history: int = 4
    test_fraction: float = 0.2
    validation: bool = False
    unknown_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, "train", self, "epochs", "tokens", "candidates", "chunk", "tiles_at_once", "negative_period")
        at_least(0, "train", self, "learning_rate", "weight_decay", "min_history", "seed", "negatives")
        for name in ("dropout", "unknown_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must lie in [0, 1), not {getattr(self, name)}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"train.test_fraction must lie in (0, 1), not {self.test_fraction}")


@dataclass(frozen=True)
class ExportConfig:
    """What the artifact is built for.

    Attributes:
        artifact: folder the artifact is written to and served from.
        version: version name in manifest, metrics and answers.
        buckets: the ladder: pairs of token rows and candidate rows, one executable each.
        matmul_precision: XLA's precision of float32 matrix products.
        platform: what executables are for; empty: what JAX runs on here.
        device_kind: compile for this described device, which need not be here (`h100`).
        tuned: choices of GPU kernels that `export tune` measured.
        signing_key: private key, PEM, that signs the artifact.
        jobs: buckets compiled at once; 0: one per core, or one where XLA measures kernels meanwhile.
        kernels: `auto`: fused kernels where the device and the model allow them; `xla`: none; `mosaic`: nothing else.
    """

    artifact: str = "runs/demo/artifact"
    version: str = "1"
    buckets: tuple[tuple[int, int], ...] = ((512, 128), (1024, 512), (2048, 1024))
    matmul_precision: Literal["default", "high", "highest"] = "highest"
    platform: Literal["", "cpu", "cuda"] = ""
    device_kind: str = ""
    tuned: str = ""
    signing_key: str = ""
    jobs: int = 0
    kernels: Literal["auto", "xla", "mosaic"] = "auto"

    def __post_init__(self) -> None:
        at_least(0, "export", self, "jobs")
        if not self.version:
            raise ValueError("export.version is empty")


@dataclass(frozen=True)
class DispatchConfig:
    """The dispatcher.

    Attributes:
        policy: what batches are made of, and when: `deadline_cost`, by deadlines and by what batches are known to take;
            or `descending`, the FLAME paper's, one request per batch, split over buckets (docs/dso.md).
        lanes: streams of each device, on which batches run beside each other, fewer where the log says why; `auto`:
            1, 2 or 4, whichever runs the most tokens a second when the artifact is loaded.
        lane_memory: share of a GPU's memory that each of its lanes but the first may take (docs/dso.md).
        devices: local devices that are used, the first ones.
        executors: executors (slot + executable) per bucket and lane, so batches on a lane at most.
        max_queue: requests waiting at most; one more is refused.
        max_wait_us: microseconds that a request waits at most for others to share its batch, while a lane is idle.
        target_wait_ms: milliseconds of work that may wait; where there is always more, the queue is cut down.
        hang_seconds: a batch that takes longer means that the device hangs: the version is given up.
        row_threads: that copy rows of an item table in host memory to slots (model.item_table).
        hot_rows_seconds: between two choices of the rows that the device holds (model.hot_rows).
    """

    policy: Literal["deadline_cost", "descending"] = "deadline_cost"
    lanes: int | Literal["auto"] = 1
    lane_memory: float = 0.05
    devices: int = 1
    executors: int = 2
    max_queue: int = 1024
    max_wait_us: float = 300.0
    target_wait_ms: float = 50.0
    hang_seconds: float = 30.0
    row_threads: int = 4
    hot_rows_seconds: float = 60.0

    def __post_init__(self) -> None:
        at_least(1, "dispatch", self, "devices", "executors", "max_queue", "row_threads")
        if self.lanes != "auto":
            at_least(1, "dispatch", self, "lanes")
        if not 0 < self.lane_memory < 1:
            raise ValueError(f"dispatch.lane_memory must lie in (0, 1), not {self.lane_memory}")
        at_least(0, "dispatch", self, "max_wait_us")
        some_seconds("dispatch", self, "hot_rows_seconds", "hang_seconds", "target_wait_ms")

    @property
    def most_lanes(self) -> int:
        """Of each device, at most."""
        return AUTO_LANES[-1] if self.lanes == "auto" else self.lanes


@dataclass(frozen=True)
class ServerConfig:
    """The gRPC server.

    Attributes:
        host: address to listen on.
        port: gRPC port; 0 takes a free one and prints it.
        metrics_port: Prometheus port; 0 takes a free one and prints it.
        admin_host: address of the admin port, which nothing authenticates.
        admin_port: port of the commands that change what is served; 0 takes a free one and prints it, -1 opens none.
        trusted_keys: public keys, PEM files: an artifact must be signed by the holder of one of them; when empty, any
            artifact that is there is served, with a warning.
        models_dir: folder of models, `models_dir/MODEL/VERSION/`; when empty, export.artifact is served.
        model: model of models_dir; may be empty when it holds one only.
        version: version served; when empty, the newest good one, also when it comes later.
        poll_seconds: how often models_dir is looked through for a newer version; 0: only on command.
        rollback_seconds: how long the version before stays loaded after a change, to go back to at once.
        canary: a second version to serve from the start on.
        canary_share: share of users, by hash, that get it.
        max_candidates: candidates of one request at most.
        max_message_mib: size of a message at most, in MiB.
        max_in_flight: calls being answered at most; one more gets RESOURCE_EXHAUSTED.
        default_timeout_ms: deadline of a call that brings none.
        strict_ids: refuse unknown users (NOT_FOUND) and unknown items (INVALID_ARGUMENT) instead of
            scoring them cold.
        drain_seconds: after SIGTERM, how long accepted calls may take to finish.
        traffic_classes: names a request may carry, and their shares of the devices when there is not enough for all;
            the first is the default.
        cores: processor cores to stay on, such as 0-7,16; `auto`: those of the NUMA node that the GPU is attached to,
            where there are several; `all`.
        log_level: level of the log on stderr.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int = 9090
    admin_host: str = "127.0.0.1"
    admin_port: int = -1
    trusted_keys: tuple[str, ...] = ()
    models_dir: str = ""
    model: str = ""
    version: str = ""
    poll_seconds: float = 2.0
    rollback_seconds: float = 30.0
    canary: str = ""
    canary_share: float = 0.0
    max_candidates: int = 4096
    max_message_mib: int = 16
    max_in_flight: int = 1024
    default_timeout_ms: int = 1000
    strict_ids: bool = False
    drain_seconds: float = 30.0
    traffic_classes: dict[str, float] = field(default_factory=lambda: {"default": 5.0, "critical": 4.0, "batch": 1.0})
    cores: str | int = "auto"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    def __post_init__(self) -> None:
        at_least(-1, "server", self, "admin_port")
        at_least(0, "server", self, "port", "metrics_port", "drain_seconds", "poll_seconds", "rollback_seconds")
        at_least(1, "server", self, "max_candidates", "max_message_mib", "max_in_flight", "default_timeout_ms")
        # gRPC keeps message sizes in a C int of bytes.
        ports = {"port": 65535, "metrics_port": 65535, "admin_port": 65535}
        for name, most in (ports | {"max_message_mib": 2047}).items():
            if getattr(self, name) > most:
                raise ValueError(f"server.{name} must be at most {most}, not {getattr(self, name)}")
        if not self.traffic_classes or not all(isinstance(n, str) and n for n in self.traffic_classes):
            raise ValueError("server.traffic_classes must be non-empty names")
        if not all(LEAST_SHARE <= share <= 1 / LEAST_SHARE for share in self.traffic_classes.values()):
            raise ValueError(f"server.traffic_classes must have shares in [{LEAST_SHARE:g}, {1 / LEAST_SHARE:g}]")
        self._check_repository()

    def _check_repository(self) -> None:
        named = [name for name in ("model", "version", "canary") if getattr(self, name)]
        if named and not self.models_dir:
            raise ValueError(f"server.{named[0]} is chosen among the versions in server.models_dir, which is empty")
        if bool(self.canary) != bool(self.canary_share):
            raise ValueError("server.canary and server.canary_share go together")
        if self.canary and not SMALLEST_SHARE <= self.canary_share <= 1:
            raise ValueError(f"server.canary_share must lie in [{SMALLEST_SHARE}, 1], not {self.canary_share}")
        if self.canary and self.canary == self.version:
            raise ValueError("server.canary and server.version name the same version")


@dataclass(frozen=True)
class Config:
    """One file configures every program: import, train, export and serve each read their sections.

    Attributes:
        schema: what the model reads and answers.
        layout: constants of the packed batch.
    """

    store: StoreConfig = StoreConfig()
    cache: CacheConfig = CacheConfig()
    data: DataConfig = DataConfig()
    schema: FeatureSchema = FeatureSchema()
    layout: Layout = Layout()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    dispatch: DispatchConfig = DispatchConfig()
    server: ServerConfig = ServerConfig()
