"""Settings of `rlhf/explore_sampling.py`: those of rejection sampling at several temperatures, and of the analysis."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.rejection_settings import RejectionSettings


@dataclass(kw_only=True)
class ExploreSettings(RejectionSettings):
    """What to sample, or which finished runs to read, and what to recommend from it."""

    from_runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "run folders of rejection sampling to analyse, one a temperature, in place of sampling; "
            "the settings of sampling are then theirs"
        },
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        metadata={"help": "each samples every prompt samples_per_prompt times; the default is the paper's, Fig. 8"},
    )
    samples_per_prompt: int = field(default=100, metadata={"help": "N: curves are drawn for every n up to it"})
    affordable_samples: int = field(
        default=0, metadata={"help": "the largest K that a round of yours can pay for; 0: samples_per_prompt"}
    )
    min_gain: float = field(
        default=0.1,
        metadata={
            "help": "K is doubled as long as the expected maximum gains more than this, in standard deviations of the "
            "scores of one prompt"
        },
    )
    prompt_files: list[str] = field(default_factory=list, metadata={"help": "prompt records, as for PPO"})
    temperature: float = field(init=False, default=1.0)  # each run's own
    min_score: float | None = field(init=False, default=None)  # leaves prompts out; the curves are over all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures:
            raise UserError("temperatures: the list is empty; give at least one")
        for temperature in self.temperatures:
            if not 0.0 < temperature <= 100.0:  # also refuses nan
                raise UserError(f"temperatures: {temperature} is out of range; give numbers above 0, at most 100")
        names = [f"{temperature:g}" for temperature in self.temperatures]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"temperatures: {twice[0]} is there twice")
        if self.samples_per_prompt < 2:
            raise UserError(f"samples_per_prompt: best-of-n needs at least 2, not {self.samples_per_prompt}")
        if self.affordable_samples < 0 or (not self.from_runs and self.affordable_samples > self.samples_per_prompt):
            raise UserError(
                f"affordable_samples {self.affordable_samples} must be at least 0 (all) and at most samples_per_prompt "
                f"{self.samples_per_prompt}: nothing is known of more"
            )
        if not 0.0 <= self.min_gain < float("inf"):
            raise UserError(f"min_gain must be 0 or more, not {self.min_gain}")

    def check_reward_sources(self) -> None:
        """Nothing yet: finished runs need no reward model. `check_source` checks where something is sampled."""


@dataclass
class ExploreModelSettings(ModelSettings):
    """The policy that is sampled."""

    model_name_or_path: str = field(default="", metadata={"help": "folder or Hub name of the policy"})


ANALYSIS = ("from_runs", "affordable_samples", "min_gain")  # the fields that `from_runs` leaves in use
NEEDED = ("model_name_or_path", "prompt_files")


def check_source(settings: ExploreSettings, model: ExploreModelSettings) -> None:
    """UserError where something to sample from is missing, or is given beside `from_runs`, which samples nothing."""
    given: dict[str, Any] = {}
    for part in (settings, model):
        for one in fields(part):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if one.name not in ANALYSIS and getattr(part, one.name) != default:
                given[one.name] = getattr(part, one.name)
    if settings.from_runs and given:
        raise UserError(
            f"from_runs reads finished runs and samples nothing, so {', '.join(given)} would not be used: leave out "
            "either"
        )
    if not settings.from_runs and (missing := [name for name in NEEDED if name not in given]):
        raise UserError(f"{', '.join(missing)}: needed for sampling; or name finished runs with from_runs")
    if not settings.from_runs:
        super(ExploreSettings, settings).check_reward_sources()
