"""Rewards of one's own: `--reward_functions docs.examples.short_answers:brevity`; docs/rewards.md has the commands."""


def brevity(completions, **kwargs):
    """A short answer is a good answer: 0 for an empty one, -1 for each hundred characters."""
    return [-len(completion[0]["content"]) / 100 for completion in completions]


def no_repetition(completion_ids, **kwargs):
    """Share of tokens that did not occur before in the response; a single token says nothing, so it does not count."""
    return [len(set(ids)) / len(ids) if len(ids) > 1 else None for ids in completion_ids]
