"""Settings of `rlhf/pipeline.py`."""

from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError

REPORTS = ("report", "simulation.report", "distil_ablation")  # modules of rlhf/


@dataclass
class PipelineSettings:
    """Settings of a pipeline run."""

    stages: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "stages: {name, run, needs, settings}"}
    )
    output_dir: str = field(default="runs/demo", metadata={"help": "folder that gets one folder a stage"})
    seed: int = field(default=0, metadata={"help": "seed of every stage, as ${seed}"})
    parallel_stages: int = field(
        default=1, metadata={"help": "stages that may run at once (forked processes, CPU only)"}
    )
    report: str = field(
        default="",
        metadata={"help": f"what tells the outcome at the end: {', '.join(REPORTS)} (see docs/evaluation.md)"},
    )
    stages_from: str = field(
        default="", metadata={"help": "YAML whose stages and variables these are, but for the variables given here"}
    )
    variables: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "what stages may name as ${name}; given in a YAML"}
    )
    values: list[str] = field(
        default_factory=list, metadata={"help": "name=value for variables: another model, other data, other sizes"}
    )

    def __post_init__(self) -> None:
        if self.parallel_stages < 1:
            raise UserError(f"parallel_stages is {self.parallel_stages}; it must be at least 1")
        if self.report and self.report not in REPORTS:
            raise UserError(f"report is '{self.report}'; there are: {', '.join(REPORTS)}, or '' for none")
