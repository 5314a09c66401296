"""Settings of the memory and time planner, and the published figures of some GPUs."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """Usable memory, dense bfloat16 TFLOP/s with float32 sums, memory GB/s, GB/s one way to other GPUs of a machine."""

    memory_gib: float
    tflops: float
    bandwidth_gb_s: float
    link_gb_s: float


# NVIDIA's data sheets: A100 80GB SXM (nvidia-a100-datasheet), H100 SXM, H200 SXM and L4 product pages, where TFLOP/s
# "with sparsity" are halved; RTX 4090: the Ada architecture white paper, appendix A (bf16 with float32 accumulate).
# Links: half of NVLink's or PCIe's two-way figure. Memory: what the driver leaves of 80, 80, 141, 24, 24 GB.
ACCELERATORS = {
    "a100_80gb": Accelerator(79.1, 312.0, 2039.0, 300.0),
    "h100_80gb": Accelerator(79.1, 989.0, 3350.0, 450.0),
    "h200": Accelerator(139.8, 989.0, 4800.0, 450.0),
    "rtx_4090": Accelerator(23.5, 165.2, 1008.0, 32.0),
    "l4": Accelerator(22.0, 121.0, 300.0, 32.0),
}


@dataclass(kw_only=True)
class PlanSettings:
    """Which machines, and what is assumed of them. The model and the run are those of PPO's own settings."""

    shape: Literal["auto", "llama2-7b", "llama2-13b", "llama2-70b"] = field(
        default="auto", metadata={"help": "built-in sizes; auto: those of model_name_or_path's config.json"}
    )
    gpu: Literal["a100_80gb", "h100_80gb", "h200", "rtx_4090", "l4"] = field(
        default="a100_80gb", metadata={"help": "whose published figures stand in for those not given below"}
    )
    gpus: int = field(default=1, metadata={"help": "processes, one GPU each; batch_size is divided among them"})
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs of one machine; more are linked by the network"})
    gpu_memory_gib: float | None = field(default=None, metadata={"help": "usable memory of a GPU"})
    gpu_tflops: float | None = field(default=None, metadata={"help": "dense bfloat16 TFLOP/s of a GPU"})
    gpu_bandwidth_gb_s: float | None = field(default=None, metadata={"help": "GB/s of a GPU's own memory"})
    link_gb_s: float | None = field(default=None, metadata={"help": "GB/s one way between GPUs of a machine"})
    network_gb_s: float = field(default=50.0, metadata={"help": "GB/s one way of a GPU's share of the network"})
    sharding: Literal["none", "fsdp2", "zero3"] = field(
        default="none", metadata={"help": "none: every process holds all; fsdp2, zero3: weights and states are split"}
    )
    judges: int = field(default=0, metadata={"help": "held-out judges loaded beside those that the config names"})
    adapter_rank: int | None = field(
        default=None,
        metadata={"help": "LoRA rank of adapter folders that are not there yet; none: lora_r, with adapter_path 64"},
    )
    mean_prompt_tokens: float | None = field(
        default=None, metadata={"help": "for the time; none: half of max_prompt_tokens"}
    )
    mean_response_tokens: float | None = field(
        default=None, metadata={"help": "for the time; none: max_new_tokens, as if nothing ended early"}
    )
    utilisation: float = field(default=0.4, metadata={"help": "share of peak TFLOP/s that matrix products reach"})
    bandwidth_utilisation: float = field(default=0.6, metadata={"help": "share of GB/s that decoding reaches"})
    as_json: bool = field(default=False, metadata={"help": "print one JSON object in place of the tables"})

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "adapter_rank"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise UserError(f"{name} must be at least 1, not {given}")
        if self.judges < 0:
            raise UserError(f"judges must not be negative, not {self.judges}")
        rates = ("gpu_memory_gib", "gpu_tflops", "gpu_bandwidth_gb_s", "link_gb_s", "network_gb_s",
                 "mean_prompt_tokens", "mean_response_tokens")  # fmt: skip
        for name in rates:
            given = getattr(self, name)
            if given is not None and not 0.0 < given < float("inf"):
                raise UserError(f"{name} must be a number above 0, not {given}")
        for name in ("utilisation", "bandwidth_utilisation"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if self.sharding != "none" and self.gpus == 1:
            raise UserError(f"sharding: {self.sharding} needs gpus above 1: one process has nothing to share")

    @property
    def accelerator(self) -> Accelerator:
        """The preset with what was given in its place; the slower network where processes are on several machines."""
        preset = ACCELERATORS[self.gpu]
        link = self.link_gb_s or preset.link_gb_s
        return Accelerator(
            self.gpu_memory_gib or preset.memory_gib,
            self.gpu_tflops or preset.tflops,
            self.gpu_bandwidth_gb_s or preset.bandwidth_gb_s,
            min(link, self.network_gb_s) if self.gpus > self.gpus_per_node else link,
        )
