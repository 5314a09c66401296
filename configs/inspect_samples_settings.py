"""Settings of `rlhf/inspect_samples.py`."""

from dataclasses import dataclass, field


@dataclass
class InspectSamplesSettings:
    """What is in the sample stores of a run folder."""

    output_dir: str = field(metadata={"help": "run folder of a stage that samples or scores in shards"})
    as_json: bool = field(default=False, metadata={"help": "print one JSON object in place of the tables"})
