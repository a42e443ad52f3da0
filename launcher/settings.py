"""The settings of one deployment: every flag of `phalanx serve`, from the command line, a config file, or the
default, in this order. Built by `cli`, read by the supervisor; never changed after it was built."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.access_settings import LOG_FORMATS, LOG_LEVELS, AccessSettings, _flag
from launcher.binding import BINDINGS
from launcher.errors import SettingsError
from launcher.hosts import check_slots, parse_hosts
from launcher.setting_values import convert, read_config
from launcher.zmq_keys import check_zmq

DTYPES = ("auto", "float32", "bfloat16")
SPARES = ("none", "warm", "hot")
JOURNALS = ("off", "disk")
MOST_FRONTS = 64
LEAST_JOURNAL_BYTES = 1 << 24
BACKENDS = ("auto", "phalanx", "deepspeed")
QUANTIZATIONS = ("none", "int8", "int4")
LAUNCHERS = ("mpirun", "slurm")
MPIS = ("auto", "openmpi", "mpich", "intel")
CHOICES = {
    "dtype": DTYPES,
    "quantization": QUANTIZATIONS,
    "spare": SPARES,
    "backend": BACKENDS,
    "journal": JOURNALS,
}
CHOICES |= {
    "log_format": LOG_FORMATS,
    "log_level": LOG_LEVELS,
    "mpi": MPIS,
    "bind": BINDINGS,
    "launcher": LAUNCHERS,
}
RELOADABLE = (
    "model",
    "tp",
    "pp",
    "dtype",
    "quantization",
    "backend",
    "expert_parallel",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "step_factor",
    "kv_cache_memory",
    "spare",
)
"""What `phalanx reload` may change: what concerns the world alone."""


def default_cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Where models and weight shards are kept."""
    if environment.get("PHALANX_CACHE"):
        return Path(environment["PHALANX_CACHE"])
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phalanx"


def default_run_dir(port: int, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the deployment on this HTTP port keeps its run folder."""
    return Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "phalanx" / str(port)


@dataclass(frozen=True)
class Settings(AccessSettings):
    """All of them, checked. Raises SettingsError when built with a value that is not allowed."""

    model: str
    tp: int = _flag(1, "ranks that share each layer (tensor parallelism)", "N")
    pp: int = _flag(1, "stages that the layers are cut into (pipeline parallelism)", "N")
    expert_parallel: bool = _flag(
        False, "put whole experts on ranks, instead of some columns of each on every rank (with --tp)"
    )
    dtype: str = _flag("auto", "numbers that the model computes with; auto: bfloat16")
    quantization: str = _flag(
        "none",
        "what weights are rounded to when they are cut: int8 or int4, in groups of 32 (on CPUs, with native kernels)",
    )
    backend: str = _flag(
        "auto",
        "what computes the layers. phalanx: our decoder, for the architectures that it knows; deepspeed: any decoder "
        "of transformers, cut by DeepSpeed AutoTP (--tp only; pip install 'phalanx-serve[deepspeed]'); auto: "
        "phalanx, and an error that says so if only deepspeed might do",
    )
    deterministic: bool = _flag(
        False,
        "a request gives the same bits whatever runs beside it, and after a fault (on CPUs, with native kernels)",
    )
    host: str = _flag("127.0.0.1", "address that HTTP listens on", "H")
    port: int = _flag(8000, "port that HTTP listens on; 0: any free one", "P")
    grpc_port: int | None = _flag(
        None,
        "port that gRPC listens on, at the address of --host; 0: any free one; default: 8001 if it is free",
        "P",
    )
    zmq: str = _flag("tcp://127.0.0.1:5555", "endpoint that the front's ZeroMQ server listens on", "ENDPOINT")
    zmq_curve_dir: Path | None = field(
        default=None,
        metadata={
            "help": "folder of CURVE keys: ZeroMQ is encrypted, and only the clients in its authorized_clients may "
            "connect; `phalanx curve-keygen` makes one. Needed where --zmq can be reached from other machines",
            "metavar": "DIR",
        },
    )
    zmq_insecure: bool = _flag(False, "other machines may connect to --zmq without keys, and unencrypted")
    max_model_len: int = _flag(0, "most tokens of prompt and output together; 0: the model's own limit", "N")
    max_num_seqs: int = _flag(64, "most sequences that run at once", "N")
    max_num_batched_tokens: int = _flag(1024, "most tokens that one step computes", "N")
    step_factor: float = _flag(
        4.0,
        "how many times as long as a step of running streams one may take that computes a new prompt beside them; "
        "0: as long as --max-num-batched-tokens take",
        "F",
    )
    kv_cache_memory: int = _flag(0, "KV cache of a rank, like 2GiB; 0: a share of the free memory", "SIZE")
    served_model_name: str = _flag("", "name that clients call the model by; default: its own", "NAME")
    tool_call_parser: str = _flag(
        "auto",
        "how the model writes tool calls: hermes, llama3_json, mistral, phi4_mini_json, granite, pythonic, gemma, "
        "qwen3_coder (docs/openai.md); auto: what its chat template says",
        "NAME",
    )
    reasoning_parser: str = _flag(
        "auto",
        "how the model marks its thoughts: think, deepseek_r1, granite, mistral, seed_oss, or none; auto: what its "
        "chat template says",
        "NAME",
    )
    spare: str = _flag(
        "warm",
        "what is kept ready for when a world dies. none: nothing, a new one is started in seconds; warm: its "
        "processes, parked after their imports, for some 200 MB a rank; hot: weights mapped as well, shared on "
        "CPUs, and half the share of memory for the KV cache. `phalanx status` shows what it takes",
    )
    fronts: int = _flag(
        1,
        "front processes on the port: each serves its share of the connections, and is restarted by itself. The "
        "first one has ZeroMQ and gRPC",
        "N",
    )
    max_wait_s: float = _flag(60.0, "how long a request waits for a world before it is refused", "SECONDS")
    max_waiting: int = _flag(1024, "how many requests may wait for their first token", "N")
    max_waiting_tokens: int = _flag(2**22, "how many tokens the prompts of those may have together", "N")
    journal: str = _flag(
        "disk",
        "where accepted requests and their tokens are kept. disk: journal.sqlite in the run folder, so that they go "
        "on when the front is killed; off: in memory",
    )
    journal_sync: bool = _flag(
        False, "sync the journal to the disk at every step: it outlives power loss, too"
    )
    journal_retention_s: float = _flag(
        600.0, "how long a finished request can be read again or taken up", "SECONDS"
    )
    journal_max_size: int = _flag(
        1 << 30, "how large the journal may get; beyond it new requests are refused", "SIZE"
    )
    disconnect_grace_s: float = _flag(
        2.0, "how long a stream whose client is gone waits for it before it is cancelled", "SECONDS"
    )
    page: bool = _flag(True, "show the worlds and a chat box to browsers, at / of the HTTP port")
    drain_timeout: float = _flag(
        30.0, "how long Ctrl-C or SIGTERM lets running requests finish; a second one ends at once", "SECONDS"
    )
    hosts: str = _flag(
        "",
        "hosts of ranks, this machine first: host:slots,host:slots or a file of `host slots=N` or `host:N` lines; "
        "default: this machine alone. MPI starts them over ssh",
        "HOSTS",
    )
    stopped_exit_code: int = _flag(
        0,
        "exit code when a signal has ended it. Where 0 means that all is done for good, as to the Job of an evicted "
        "pod, give another one, like 143",
        "N",
    )
    wait_for_hosts: float | None = field(
        default=None,
        metadata={
            "help": "how long hosts may take to answer before the first world; default: 60, in an MPIJob as long as "
            "it takes. Once a world has served, they are waited for in any case",
            "metavar": "SECONDS",
        },
    )
    interface: str = _flag(
        "",
        "network interface over which hosts reach each other: its name, or a network like 10.0.0.0/8; "
        "default: as MPI and the routes find",
        "NAME",
    )
    elastic: bool = _flag(
        False,
        "while hosts of --hosts are lost and the others do not suffice, serve with fewer ranks, and with all again "
        "when they are back",
    )
    bind: str = _flag(
        "none",
        "cores that each rank gets. none: the kernel moves ranks as it likes, since they share it with the front "
        "and a spare; core: an even share of the host's cores; numa, socket: all of one",
    )
    run_dir: Path | None = field(
        default=None,
        metadata={
            "help": "folder for lock, logs and sockets; default: ~/.local/state/phalanx/PORT",
            "metavar": "DIR",
        },
    )
    mpirun: Path | None = field(
        default=None,
        metadata={"help": "the mpirun to start worlds with; default: found", "metavar": "PATH"},
    )
    launcher: str = _flag(
        "mpirun",
        "what starts worlds. slurm: srun, as steps of the job that this runs in, on its nodes (docs/slurm.md)",
    )
    mpi: str = _flag("auto", "the MPI to start worlds with; auto: that of the mpirun that is found first")

    def __post_init__(self) -> None:
        self.check_access()
        if not self.model:
            raise SettingsError("MODEL is missing: give a catalog name, a folder, a GGUF file or a hub id")
        for name, least in (
            ("tp", 1),
            ("pp", 1),
            ("max_model_len", 0),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("kv_cache_memory", 0),
            ("max_waiting", 1),
            ("max_waiting_tokens", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise SettingsError(f"{_as_flag(name)} {value}: must be {least} or more")
        if not 1 <= self.fronts <= MOST_FRONTS:
            raise SettingsError(f"--fronts {self.fronts}: must be from 1 to {MOST_FRONTS}")
        if self.launcher not in LAUNCHERS:
            raise SettingsError(f"--launcher {self.launcher}: must be one of {', '.join(LAUNCHERS)}")
        hosts = parse_hosts(self.hosts)
        check_slots(hosts, self.tp * self.pp)
        if self.elastic and len(hosts) < 2 and self.launcher == "mpirun":
            raise SettingsError("--elastic: there is one host only; name two or more with --hosts")
        if self.dtype not in DTYPES:
            raise SettingsError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if self.backend not in BACKENDS:
            raise SettingsError(f"--backend {self.backend}: must be one of {', '.join(BACKENDS)}")
        if self.backend == "deepspeed" and self.pp != 1:
            raise SettingsError(
                f"--pp {self.pp}: --backend deepspeed has no pipeline; use --pp 1 and more --tp, or --backend phalanx"
            )
        if self.spare not in SPARES:
            raise SettingsError(f"--spare {self.spare}: must be one of {', '.join(SPARES)}")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"--port {self.port}: must be from 0 to 65535")
        if self.grpc_port is not None and not 0 <= self.grpc_port <= 65535:
            raise SettingsError(f"--grpc-port {self.grpc_port}: must be from 0 to 65535")
        if not re.match(r"(tcp|ipc)://.", self.zmq):
            raise SettingsError(f"--zmq {self.zmq}: write it like tcp://127.0.0.1:5555")
        check_zmq(self.zmq, self.zmq_curve_dir, self.zmq_insecure)
        if self.step_factor and not self.step_factor >= 1.5:
            raise SettingsError(f"--step-factor {self.step_factor:g}: must be 1.5 or more, or 0 for no bound")
        if not self.max_wait_s > 0:
            raise SettingsError(f"--max-wait-s {self.max_wait_s:g}: must be more than 0")
        if self.journal not in JOURNALS:
            raise SettingsError(f"--journal {self.journal}: must be one of {', '.join(JOURNALS)}")
        if self.journal_max_size < LEAST_JOURNAL_BYTES:
            raise SettingsError(
                f"--journal-max-size {self.journal_max_size}: must be {LEAST_JOURNAL_BYTES >> 20}MiB or more"
            )
        if not self.journal_retention_s >= 0:
            raise SettingsError(f"--journal-retention-s {self.journal_retention_s:g}: must be 0 or more")
        if not 0 <= self.disconnect_grace_s <= 86400:
            raise SettingsError(f"--disconnect-grace-s {self.disconnect_grace_s:g}: must be from 0 to 86400")
        if self.wait_for_hosts is not None and not self.wait_for_hosts >= 0:
            raise SettingsError(f"--wait-for-hosts {self.wait_for_hosts:g}: must be 0 or more")
        if not 0 <= self.stopped_exit_code <= 255:
            raise SettingsError(f"--stopped-exit-code {self.stopped_exit_code}: must be from 0 to 255")
        if not 0 <= self.drain_timeout <= 86400:
            raise SettingsError(f"--drain-timeout {self.drain_timeout:g}: must be from 0 to 86400")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise SettingsError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens}: must be at least --max-num-seqs "
                f"({self.max_num_seqs}), or not every sequence gets a token in a step"
            )

    @property
    def ranks(self) -> int:
        """Size of the world."""
        return self.tp * self.pp

    @classmethod
    def add_reload_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds MODEL and a flag for each field that a running deployment can change."""
        parser.add_argument("model", metavar="MODEL", nargs="?", help="default: the model that is served")
        cls._add_flags(parser, [name for name in RELOADABLE if name != "model"], with_defaults=False)

    @classmethod
    def changes_from(cls, arguments: argparse.Namespace) -> dict[str, Any]:
        """What the arguments of `reload` ask to be changed. Raises SettingsError."""
        kinds = _kinds()
        return {
            name: convert(name, kinds[name], value, f"{_as_flag(name)} {value}")
            for name, value in vars(arguments).items()
            if name in RELOADABLE and value is not None
        }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds MODEL, --config and a flag for every field."""
        parser.add_argument(
            "model", metavar="MODEL", nargs="?", help="catalog name, folder, GGUF file or hub id"
        )
        cls._add_flags(parser, [setting.name for setting in fields(cls) if setting.name != "model"])
        parser.add_argument(
            "--config", metavar="FILE.yaml", type=Path, help="file with the same names as flags"
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print which rank would run where, and the command and the environment of the world; start nothing",
        )

    @classmethod
    def _add_flags(
        cls, parser: argparse.ArgumentParser, names: Sequence[str], with_defaults: bool = True
    ) -> None:
        for setting in fields(cls):
            if setting.name in names and setting.type == "bool":
                parser.add_argument(
                    _as_flag(setting.name),
                    action=argparse.BooleanOptionalAction,
                    default=argparse.SUPPRESS,
                    help=setting.metadata["help"],
                )
            elif setting.name in names:
                default_text = _default_text(setting.default) if with_defaults else ""
                parser.add_argument(
                    _as_flag(setting.name),
                    metavar=setting.metadata["metavar"],
                    choices=CHOICES.get(setting.name),
                    default=argparse.SUPPRESS,  # so that the config file's value is not covered by a default
                    help=f"{setting.metadata['help']}{default_text}",
                )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Settings:
        """Command line over config file over default. Raises SettingsError."""
        values: dict[str, Any] = {}
        if arguments.config is not None:
            values.update(read_config(arguments.config, _kinds()))
        kinds = _kinds()
        for name, value in vars(arguments).items():
            if name in kinds and value is not None:
                values[name] = convert(name, kinds[name], value, f"{_as_flag(name)} {value}")
        return cls(**{"model": "", **values})


def _kinds() -> dict[str, str]:
    """The type of each setting, as it is written above."""
    return {setting.name: str(setting.type) for setting in fields(Settings)}


def _as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default_text(default: Any) -> str:
    sizes = {1 << 30: "1GiB", 1 << 24: "16MiB"}
    if default in sizes:
        return f" (default: {sizes[default]})"
    return f" (default: {default})" if default not in (None, "", 0) else ""
