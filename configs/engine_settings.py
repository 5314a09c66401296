"""Where responses are sampled: settings shared by the stages that can choose their engine."""

from dataclasses import dataclass, field, fields
from typing import Literal
from urllib.parse import urlsplit

from configs.errors import UserError

SERVER_FIELDS = ("server_url", "server_model", "server_api", "server_concurrency", "server_timeout",
                 "server_max_retries")  # fmt: skip
# What names or drives a server without changing what it draws: rows sampled under other values of these stay valid.
NOT_SAMPLED = (*(name for name in SERVER_FIELDS if name != "server_model"), "max_failed_share")


@dataclass(kw_only=True)
class EngineSettings:
    """The sampling engine. An API key is read from the environment (SAMPLING_SERVER_API_KEY), never from a setting."""

    sampling_engine: Literal["auto", "in_process", "continuous_batching", "server"] = field(
        default="auto",
        metadata={
            "help": "auto: the server where server_url names one, in_process on a CPU, on CUDA the faster of "
            "in_process and continuous_batching as timed on the first prompts"
        },
    )
    server_url: str | None = field(
        default=None, metadata={"help": "an OpenAI-compatible server, such as http://127.0.0.1:8000/v1"}
    )
    server_model: str | None = field(
        default=None,
        metadata={"help": "the model's name there; none: the only one it lists, else model_name_or_path"},
    )
    server_api: Literal["auto", "completions", "chat"] = field(
        default="auto", metadata={"help": "auto: completions where it takes token ids, else chat"}
    )
    server_concurrency: int = field(default=64, metadata={"help": "requests at a time"})
    server_timeout: float = field(default=600.0, metadata={"help": "seconds that one request may take"})
    server_max_retries: int = field(
        default=4, metadata={"help": "times that a failed request is tried again, waiting longer each time"}
    )
    max_failed_share: float = field(
        default=0.0, metadata={"help": "share of prompts that may stay without samples; above it the run is an error"}
    )

    @property
    def engine(self) -> str:
        """The engine as far as the settings decide it: auto is left where the device decides."""
        return "server" if self.sampling_engine == "auto" and self.server_url else self.sampling_engine

    def check_engine(self) -> None:
        """UserError for a value out of range, and for one without effect under the chosen engine."""
        if self.engine == "server":
            self._check_server()
        if not 0.0 <= self.max_failed_share < 1.0:
            raise UserError(f"max_failed_share must be in [0, 1), not {self.max_failed_share}")
        idle: tuple[str, ...] = () if self.engine == "server" else SERVER_FIELDS
        idle += ("max_failed_share",) if self.engine == "in_process" else ()
        idle += ("token_budget",) if self.engine in ("server", "continuous_batching") else ()
        for one in fields(self):
            if one.name in idle and getattr(self, one.name) != one.default:
                without = " without server_url" if self.engine == "auto" else ""
                raise UserError(
                    f"{one.name}: {getattr(self, one.name)!r} has no effect with sampling_engine "
                    f"{self.sampling_engine}{without}; leave it out"
                )

    def _check_server(self) -> None:
        if not self.server_url:
            raise UserError("server_url: sampling_engine server needs one, such as http://127.0.0.1:8000/v1")
        try:
            parts = urlsplit(self.server_url)
            port_fits = parts.port is None or parts.port > 0
        except ValueError:
            port_fits = False
        if not port_fits or parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise UserError(f"server_url: {self.server_url!r} is no address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise UserError("server_url: leave user and password out; a key belongs in SAMPLING_SERVER_API_KEY")
        if self.server_concurrency < 1:
            raise UserError(f"server_concurrency must be at least 1, not {self.server_concurrency}")
        if not 0.0 < self.server_timeout < float("inf"):
            raise UserError(f"server_timeout must be a number of seconds above 0, not {self.server_timeout}")
        if self.server_max_retries < 0:
            raise UserError(f"server_max_retries must not be negative, not {self.server_max_retries}")
